"""What the compiler says of a program, without the hardware."""

"""From a command to the machines that run it."""

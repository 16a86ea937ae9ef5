"""What every command shares: the door, journals, child processes, machines, plots."""

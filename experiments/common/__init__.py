"""Common to all commands: their table, the door, the journal, child processes, the machine, the look of plots."""

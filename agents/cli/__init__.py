"""The command `asg`."""

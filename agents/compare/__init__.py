"""`asg compare`: ways of training side by side on the same test instances."""

"""`asg benchmark`: methods x suites x training seeds, in one table."""

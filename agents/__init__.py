"""Policies for `asg_env`, and what trains, judges and exports them."""

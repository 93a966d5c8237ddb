"""`asg report`: a run or a benchmark as one page."""

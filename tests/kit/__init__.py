"""What tests share: runners of jobs, models, and the kits of the larger themes."""

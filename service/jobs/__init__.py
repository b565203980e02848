"""Jobs: submission, admission, states, and what a run leaves behind."""

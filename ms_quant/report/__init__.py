"""Pages about checkpoints, jobs and analyses: each one file of HTML that needs no network."""

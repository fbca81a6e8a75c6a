"""From a command to an output: request, plan, run, write, convert."""

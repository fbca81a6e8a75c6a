"""A program that is killed at a rename: what it has on disk then is all that there is."""

KILLED_AT_RENAME = """
import os, signal, sys
from pathlib import Path

model, calib, output, last = sys.argv[1:]
original, count = Path.replace, 0

def replace(self, target):
    global count
    count += 1
    if count == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)

Path.replace = replace
"""
"""Of its arguments the last says which rename."""

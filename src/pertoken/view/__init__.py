"""Views of a trace: in the terminal and as a self-contained HTML report. What they show is read off the trace alone."""

"""The claims of the Perceiver AR paper (Hawthorne et al. 2022, arXiv 2202.07765), each one command."""

"""A machine that executes compiled GPU code (PTX) on numpy lanes and checks every access. See README.md."""

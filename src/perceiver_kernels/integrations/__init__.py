"""The op inside other people's models. Each module needs the package it is named after, so import it by name."""

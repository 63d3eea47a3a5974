"""One file per architecture, and what some of them share."""

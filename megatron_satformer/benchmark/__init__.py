"""What is timed, and how. Must not be imported by anything but tools."""

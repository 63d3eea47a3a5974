"""The main job on real input, start to end: corpus, training, export, samples, pictures.

Every step runs a tool of this project in a process of its own; here is what to run, what is done
already, and how it is told. This room may read all others; none may read it. Importing it imports
neither torch nor Megatron.
"""

"""The main job on real input, start to end. Reads all other rooms; none may read it."""

"""Models for Hugging Face transformers: they import torch and transformers, and nothing of ours.

An export holds all that its class needs in one file, see `checkpoint/hugging_face/code.py`.
"""

"""Retrieval tasks: made with a seed and no network, solved by a program, asked of a model.

    examples    what an example is, and how difficult
    words       tasks over single tokens: mqar, selective_copying, induction, key_value
    prose       tasks in text: phonebook, passkey
    tasks       the table of both, with the program that solves each
    vocabulary  which words are single tokens; a tokenizer of such words
    encoding    text to tokens of one length, and which of them are the answer
    files       everything as .bin/.idx with masks, and as tasks of lm_eval
    accuracy    exact match of a model

Must not know: how a model is trained.
"""

"""What the learned access of a trained model does: gates, or other weights of earlier layers.

access      where a model shows its weights; records them, or puts others in their place
categories  tokens by what they are and where they stand
sums        what is kept of a stream of tokens: sums, resampled sums, histograms, highest values
measure     forward passes over text and retrieval prompts
effects     the table of categories, with intervals
ablations   what the loss and retrieval are without a layer, a head, or the tokens' say
claims      what was claimed of gates, judged by intervals
texts, page, figures, report    what is written
"""

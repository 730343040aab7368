"""RULER (arXiv:2404.06654): 13 synthetic tasks of any length, made here from text that every machine has.

Tasks, their sizes, prompts and scores are those of github.com/NVIDIA/RULER (Apache-2.0: scripts/synthetic.yaml and
scripts/data/synthetic/). Different are the sources that it downloads: essays are any text, words come from lists of
ours, and the two tasks of questions are made of local documents (or a file), not of SQuAD and HotpotQA.
"""

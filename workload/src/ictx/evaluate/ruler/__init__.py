"""RULER (arXiv:2404.06654): 13 synthetic tasks of any length, generated from local text.

Tasks, their sizes, prompts and scores are those of github.com/NVIDIA/RULER (Apache-2.0: scripts/synthetic.yaml and
scripts/data/synthetic/). The sources that it downloads are replaced: essays are any text, words come from our own
lists, and the two question tasks use local documents (or a file) instead of SQuAD and HotpotQA.
"""

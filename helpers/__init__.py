"""The thin package behind the notebooks: from MIMIC-IV files to one ICD-10-CM code and its
hierarchical F1."""

__version__ = "0.1.0"

"""Solutions of the exercises of notebook 1. Each block is what a student writes into one cell."""

# %% 1.1
known_at_admission = {
    "chief_complaint": True,
    "procedure": False,  # stands early, is written at the end
    "medical_history": True,
    "medications": True,  # taken at home
    "exam": True,
    "exam_discharge": False,
    "results": False,  # chosen by somebody who knows the diagnosis
    "hospital_course": False,
    "discharge_medications": False,
}

# %% 1.2
import numpy as np
import pandas as pd


def split_by_case(cases: pd.DataFrame, seed: int) -> np.ndarray:
    """ "train", "val" or "test" for each row, whatever its patient."""
    order = np.random.default_rng(seed).permutation(len(cases))
    train, val = round(0.7 * len(cases)), round(0.8 * len(cases))
    split = np.empty(len(cases), dtype=object)
    split[order[:train]] = "train"
    split[order[train:val]] = "val"
    split[order[val:]] = "test"
    return split


def known_share(cases: pd.DataFrame, split: np.ndarray) -> float:
    """The share of test cases whose patient has a case in training."""
    patients = cases["subject_id"]
    known = set(patients[split == "train"])
    return patients[split == "test"].isin(known).mean()


# %% 1.3
summary = """Chief Complaint:
cough

History of Present Illness:
Cough and fever for three days.

Physical Exam:
Crackles at the right base.
Brief Hospital Course:
Treated for pneumonia with ceftriaxone.

Discharge Diagnosis:
Pneumonia
"""
secret = "Treated for pneumonia"

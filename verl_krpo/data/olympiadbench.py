"""OlympiadBench (arXiv 2402.14008), its open-ended English competition mathematics without images: 674 problems."""

from verl_krpo.data.source import Dataset, Problem


def problem(record: dict) -> Problem | None:
    answers = [answer.strip(" $.\n") for answer in record["final_answer"] or []]
    context = (record["context"] or "").strip()
    question = record["question"].strip()
    if not answers:
        return None
    return Problem(f"{context}\n{question}" if context else question, ", ".join(answers), {"type": record["subfield"]})


DATASET = Dataset(
    name="olympiadbench",
    repo="Hothan/OlympiadBench",
    configs=("OE_TO_maths_en_COMP",),
    splits={"test": "train"},
    columns=("question", "final_answer", "context", "subfield"),
    problem=problem,
    about="OlympiadBench, open-ended English competition mathematics without images: 674 problems for evaluation "
    "(arXiv 2402.14008; Hothan/OlympiadBench, Apache-2.0 license). Several answers to a problem are joined by commas.",
)

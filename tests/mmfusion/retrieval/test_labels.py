"""Names, tones and letters of labels, of equal worth and of equal spelling too."""

from mmfusion.retrieval.labels import letters, names, share_names, tones

ESCI = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}


def test_labels_worth_the_same_have_one_name():
    assert names(ESCI) == {1.0: "E", 0.1: "S", 0.01: "C", 0.0: "I"}
    assert names({"E": 1.0, "C": 0.0, "S": 0.1, "I": 0.0}) == {1.0: "E", 0.0: "C+I", 0.1: "S"}


def test_share_names_are_those_of_the_metrics():
    assert share_names({"E": 1.0, "C": 0.0, "I": 0.0}) == {
        "share_e": "E", "share_c+i": "C+I", "share_unjudged": "unjudged",
    }  # fmt: skip
    assert share_names({"Good": 1.0, "good": 0.0}) == {
        "share_Good": "Good", "share_good": "good", "share_unjudged": "unjudged",
    }  # fmt: skip
    assert share_names({}) == {"share_unjudged": "unjudged"}


def test_a_label_called_unjudged_moves_no_other():
    assert share_names({"A": 1.0, "Unjudged": 0.5, "B": 0.0})["share_b"] == "B"


def test_tones_go_from_best_to_worst():
    assert tones(ESCI) == {"E": 0, "S": 1, "C": 2, "I": 3}
    assert tones({"no": 0.0, "yes": 1.0}) == {"yes": 0, "no": 3}
    assert tones({"C": 0.0, "E": 1.0, "I": 0.0}) == {"E": 0, "C+I": 3}
    assert tones({}) == {}


def test_letters_tell_labels_apart():
    assert letters(ESCI) == {label: label for label in "ESCI"}
    assert letters({"Exact": 2, "Partial": 1, "Irrelevant": 0}) == {"Exact": "E", "Partial": "P", "Irrelevant": "I"}
    assert letters({"good": 0, "great": 1, "go": 2}) == {"good": "goo", "great": "gr", "go": "go"}
    assert letters({"Exact": 1, "Complement": 0, "Irrelevant": 0}) == {"Exact": "E", "Complement+Irrelevant": "C+I"}
    assert letters({"e": 1, "E": 0}) == {"e": "e", "E": "E"}

"""Every mutation applies to the source, and a seed always chooses the same mutations."""

import pytest
from catalogue import PACKAGE, ROOT, Mutation, choose, read_mutations

MUTATIONS = read_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies_once_and_has_tests(mutation: Mutation) -> None:
    text = (ROOT / PACKAGE / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, "update the mutation to the changed source"
    changed = text.replace(mutation.old, mutation.new)
    assert changed != text
    compile(changed, mutation.file, "exec")
    assert mutation.promise.endswith(".")
    assert mutation.tests
    assert not mutation.find_missing_tests()


def test_there_are_two_hundred_mutations() -> None:
    assert len(MUTATIONS) >= 200


def test_a_seed_chooses_the_same_mutations() -> None:
    chosen = choose(MUTATIONS, 10, "0123abc")
    assert len(chosen) == 10
    assert chosen == choose(MUTATIONS, 10, "0123abc")
    assert chosen != choose(MUTATIONS, 10, "another")

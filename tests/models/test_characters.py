from hypothesis import given
from hypothesis import strategies as st

from uncollapse.models.characters import CHARACTERS, character_tokenizer

TOKENIZER = character_tokenizer()


@given(st.text(alphabet=CHARACTERS))
def test_text_survives_the_round_trip_one_token_a_character(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


@given(st.text())
def test_any_text_can_be_encoded(text):
    assert len(TOKENIZER.encode(text.encode("utf-8", "ignore").decode())) <= len(text)


def test_special_tokens():
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id) == (0, 1, 2)
    assert TOKENIZER.encode("é") == [2]
    assert TOKENIZER.encode("7<eos>")[-1] == TOKENIZER.eos_token_id
    batch = TOKENIZER(["1", "123"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]

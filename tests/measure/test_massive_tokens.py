"""`detect(tokenizer=)`: which tokens massive activations are on, against a count by hand."""

from __future__ import annotations

from collections import Counter

import pytest

import biassurgery as bs
from biassurgery.errors import BadOption
from tests.checkpoints import tokenizer
from tests.models import DELIMITER_ID, START_ID, images, planted, planted_vit, tokens


def test_tokens_are_counted_by_role_and_position() -> None:
    words = tokenizer(bos=True)
    ids = tokens(4, 24, delimiter_at=9)
    found = bs.detect(planted("llama"), [ids[:3], ids[3:]], tokenizer=words)
    plain = bs.detect(planted("llama"), [ids])
    layer = found.roles[0].layer
    wanted = Counter[tuple[str, int]]()
    for role in plain.roles:
        if role.layer == layer:
            wanted[role.role, START_ID if role.role == "start" else DELIMITER_ID] += role.count
    assert {role for role, _ in wanted} == {"start", "elsewhere"}
    told = {
        (role.role, token.token): token.count
        for role in found.roles
        if role.layer == layer
        for token in role.words
    }
    assert told == wanted
    texts = {role.role: role.words[0].text for role in found.roles if role.layer == layer}
    assert texts == {"start": words.decode([START_ID]), "elsewhere": words.decode([DELIMITER_ID])}
    for position in found.positions:
        (token,) = position.words
        assert token.token == {0: START_ID, 9: DELIMITER_ID}[position.position]
        assert token.count == position.count
    text = str(found)
    assert f"{texts['start']!r} (4)" in text
    assert f"9 {texts['elsewhere']!r} (4)" in text
    assert f"start 50.0 % ({texts['start']!r})" in found.summary[1]
    assert (found.sites, found.layers) == (plain.sites, plain.layers)
    assert all(role.words == () for role in plain.roles)


def test_a_token_of_line_breaks_can_be_read() -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return {START_ID: "\n\n", DELIMITER_ID: "\N{REPLACEMENT CHARACTER}"}.get(ids[0], "a")

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"<0x{token:02X}>"

    found = bs.detect(planted("llama"), [tokens()], tokenizer=Words())
    assert "'\\n\\n' (4)" in str(found)
    assert f"'<0x{DELIMITER_ID:02X}>' (4)" in str(found)


def test_embeddings_have_no_tokens() -> None:
    model = planted("llama")
    embeddings = model.get_input_embeddings()(tokens()).detach()
    found = bs.detect(model, [{"inputs_embeds": embeddings}], tokenizer=tokenizer(bos=True))
    assert {token.token for role in found.roles for token in role.words} == {-1}


def test_a_checkpoint_goes_on(tmp_path) -> None:
    batches = [tokens(3, seed=1), tokens(3, seed=2)]
    words = tokenizer(bos=True)
    whole = bs.detect(planted("llama"), batches, tokenizer=words)
    file = tmp_path / "pass"
    bs.detect(planted("llama"), batches, tokenizer=words, checkpoint=file)
    again = bs.detect(planted("llama"), batches, tokenizer=words, checkpoint=file)
    assert again.roles == whole.roles
    assert again.positions == whole.positions


@pytest.mark.parametrize("given", ["gpt2", 3])
def test_what_is_no_tokenizer(given: object) -> None:
    with pytest.raises(BadOption, match="tokenizer: a "):
        bs.detect(planted("llama"), [tokens()], tokenizer=given)


def test_images_have_no_tokens() -> None:
    with pytest.raises(BadOption, match="tokenizer: this model reads images"):
        bs.detect(planted_vit(), images(), tokenizer=tokenizer(bos=True))


def test_by_name_it_needs_a_tokenizer() -> None:
    with pytest.raises(BadOption, match="'massive_tokens' needs a tokenizer"):
        bs.detect(planted("llama"), [tokens()], statistics=("massive_tokens",))

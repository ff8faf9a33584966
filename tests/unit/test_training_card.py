"""The model card says what the results say."""

from training.card import BEGIN, CARD, END, FOLDER, build_tables, write_tables


def test_card_shows_the_figures_of_the_results():
    card = CARD.read_text()
    assert card.count(BEGIN) == card.count(END) == 1
    assert write_tables(card, build_tables(FOLDER / "results")) == card


def test_write_tables_replaces_what_was_between_the_markers():
    assert write_tables(f"a\n{BEGIN}old\n{END}b\n", "| new |") == f"a\n{BEGIN}\n| new |\n{END}b\n"

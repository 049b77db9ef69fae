"""Exercises: one choice is right, what is asked is text, and the page shows a reply only to a choice."""

from html import unescape

import pytest

from nb_utils.show import exercises


def test_one_choice_is_right_and_all_that_is_asked_is_text():
    page = exercises.ask("Which <b>?", ["a", "<i>", "c"], 1, "because & why").data
    assert page.count("Right. ") == 1 and page.count("No. ") == 2 and unescape(page).count("because & why") == 3
    assert "<b>" not in page and "<i>" not in page
    told = unescape(page)
    assert told.index("<i>") < told.index("Right. ") < told.index(">c<")
    with pytest.raises(ValueError, match="The right choice is 3: it is one of 0 to 2"):
        exercises.ask("Which?", ["a", "b", "c"], 3, "")


def test_a_reply_appears_with_its_choice_alone(browser):
    tab = browser.new_page()
    tab.set_content(exercises.ask("Which?", ["a", "b"], 0, "It is so.").data)
    replies = tab.locator(".nb-ask p")
    assert [reply.is_visible() for reply in replies.all()] == [False, False]
    tab.get_by_label("b").check()
    assert [reply.is_visible() for reply in replies.all()] == [False, True]
    assert replies.nth(1).inner_text() == "No. It is so."
    tab.close()


@pytest.mark.parametrize("given, says", [(2, "too low"), (3, "is right"), (3.4, "is right"), (4, "too high")])
def test_a_number_of_the_readers_is_judged(given, says):
    assert says in exercises.check(given, 3, within=0.5).data

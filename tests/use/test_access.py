"""Who is let in to the page: its own names, pages of its own, and the token; and how a browser is told of it."""

import asyncio
import logging
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grad_nb.use import access
from grad_nb.use.access import Door, in_browser, provider
from grad_nb.use.errors import PlainLines

HERE = "127.0.0.1:5006"


@pytest.mark.parametrize("host", ["127.0.0.1:5006", "localhost", "LOCALHOST:1", "[::1]:5006", "::1"])
def test_own_names_are_let_in_with_the_token(host):
    door = Door("127.0.0.1")
    if host != "::1":  # no Host has it without brackets
        assert door.refusal(host, None, door.token) == ""
        assert door.refusal(host, f"http://{host}", door.token) == ""


@pytest.mark.parametrize(
    "host",
    [
        "elsewhere.example",
        "127.0.0.1.elsewhere.example",
        "localhost.elsewhere.example:5006",
        "192.0.2.1",
        "",
        "[",
        "a:b:c",
    ]
    + ["127.0.0.1@elsewhere.example", "x@127.0.0.1", "127.0.0.1#x", "2130706433", "0x7f.1", "\udcff", "[::1", "//"],
)
def test_another_name_is_refused_whatever_the_token(host):
    door = Door("127.0.0.1")
    assert "names" in door.refusal(host, None, door.token)


@pytest.mark.parametrize(
    "origin",
    ["http://elsewhere.example", "null", "", "http://localhost:5007", "http://127.0.0.1", "http://[::1", "file://"]
    + ["http://127.0.0.1:5006.elsewhere.example", "http://user@127.0.0.1:5006"],
)
def test_a_page_from_elsewhere_is_refused_whatever_the_token(origin):
    door = Door("127.0.0.1")
    assert "elsewhere" in door.refusal(HERE, origin, door.token)


@settings(max_examples=300, deadline=None)
@given(host=st.text(), origin=st.none() | st.text(), token=st.text())
def test_nothing_that_is_asked_lets_anybody_in_without_the_token(host, origin, token):
    door = Door("127.0.0.1")
    assert door.refusal(host, origin, token)
    assert door.refusal(HERE, None, token) and door.refusal(HERE, None, door.token[:-1] + "é")


def test_a_page_for_other_machines_answers_to_numbers_and_its_own_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Station")
    monkeypatch.setattr("socket.getfqdn", lambda: "station.example")
    door = Door("0.0.0.0")
    for host in ("192.0.2.7:5006", "[2001:db8::1]:5006", "station:5006", "station.example", "localhost:5006"):
        assert door.refusal(host, None, door.token) == ""
    assert "names" in door.refusal("elsewhere.example", None, door.token)
    assert "token" in door.refusal("192.0.2.7:5006", None, "")


def test_the_token_is_in_no_representation_and_never_twice():
    tokens = {Door("127.0.0.1").token for _ in range(20)}
    assert len(tokens) == 20 and all(len(token) >= 32 for token in tokens)
    door = Door("127.0.0.1")
    assert door.token not in repr(door)


def test_the_server_asks_the_door_before_it_answers():
    pytest.importorskip("bokeh")
    from tornado.web import HTTPError

    door = Door("127.0.0.1")
    asked = provider(door, 5006).get_user_async

    class Handler:
        def __init__(self, token="", cookie="", **headers):
            self.token, self.kept, self.said, self.set = token, cookie, {}, {}
            self.request = type("Request", (), {"headers": {"Host": HERE} | headers})

        def get_query_argument(self, name, default):
            return self.token

        def get_cookie(self, name, default):
            return self.kept if name == "grad_nb_5006" else default

        def set_header(self, name, value):
            self.said[name] = value

        def set_cookie(self, name, value, **how):
            self.set[name] = (value, how)

    first = Handler(token=door.token)
    asyncio.run(asked(first))
    assert first.set == {"grad_nb_5006": (door.token, {"httponly": True, "samesite": "Strict"})}
    assert first.said == access.HEADERS
    second = Handler(cookie=door.token)
    asyncio.run(asked(second))
    assert not second.set
    for handler in (Handler(), Handler(token="x", cookie=door.token), Handler(token=door.token, Host="evil.example")):
        with pytest.raises(HTTPError) as said:
            asyncio.run(asked(handler))
        assert said.value.status_code == 403 and not handler.set


def test_the_browser_is_told_by_a_file_that_only_we_can_read(monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with in_browser('http://127.0.0.1:1/?token=a&"><script>') as path:
        assert opened == [path.as_uri()] and "token" not in opened[0]
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert "token=a&amp;&quot;&gt;&lt;script&gt;" in path.read_text("utf-8")
    assert not path.parent.exists()


def test_what_the_server_logs_does_nothing_to_a_terminal():
    record = logging.LogRecord("tornado.access", logging.WARNING, "", 1, "403 GET /%s", ("\x1b]0;x\x07\nb",), None)
    assert PlainLines().format(record) == "403 GET /\\x1b]0;x\\x07\nb"

"""Access to the server: host names, origins and tokens."""

from __future__ import annotations

import asyncio
import base64
import hashlib

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.web.auth import AccessGuard, AccessRules, access_rules, is_loopback, new_token
from sbtk_runtime.web.refusals import DATA_POLICY, PAGE_POLICY, SecurityHeaders

HOST = "127.0.0.1:8000"
TOKEN = "a-token-for-tests"
BEARER = f"Bearer {TOKEN}"


async def _reached(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"reached, trusted: {request.state.is_trusted}")


def ask(
    rules: AccessRules,
    path: str = "/v1/gallery",
    method: str = "GET",
    origin_of_url: str = "http://server",
    **headers: str,
) -> httpx.Response:
    """Return what the guard, or the app behind it, answers; `a_b` names the header `a-b`."""
    paths = ("/", "/v1/gallery", "/v1/query", "/healthz", "/static/main.js")
    app = Starlette(routes=[Route(path, _reached, methods=["GET", "POST"]) for path in paths])
    guarded = SecurityHeaders(AccessGuard(app, rules))
    named = [
        (name.replace("_", "-").encode(), value.encode("latin-1"))
        for name, value in ({"host": HOST} | headers).items()
    ]

    async def answered() -> httpx.Response:
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url=origin_of_url) as client:
            return await client.request(method, path, headers=named)

    return asyncio.run(answered())


def refusal(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "next"}
    assert error["message"].endswith(".")
    assert "reached" not in answer.text
    return answer.status_code, error["code"]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8000", "localhost:8000", "LOCALHOST:8000", "[::1]:8000", "localhost."],
)
def test_loopback_names_are_accepted(host: str) -> None:
    assert ask(access_rules("127.0.0.1"), host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8000",
        "127.0.0.2:8000",
        "0.0.0.0:8000",
        "127.0.0.1:8000@evil.example",
        "127.0.0.1,evil.example",
        "",
        "2130706433:8000",
    ],
)
def test_other_host_names_are_refused(host: str) -> None:
    for path in ("/v1/gallery", "/healthz", "/"):
        assert refusal(ask(access_rules("127.0.0.1"), path, host=host)) == (403, "foreign_host")


def test_host_names_can_be_allowed_for_reverse_proxies() -> None:
    rules = access_rules("127.0.0.1", ["Photos.Example:443"])
    assert ask(rules, host="photos.example").status_code == 200
    assert ask(rules, host="photos.example:8443").status_code == 200
    assert refusal(ask(rules, host="other.example"))[1] == "foreign_host"


def test_a_server_on_all_addresses_accepts_any_address_but_no_other_name() -> None:
    for listening in ("0.0.0.0", "::"):
        rules = access_rules(listening, token=TOKEN)
        for address in ("192.168.1.7:8000", "[fe80::17]:8000"):
            assert ask(rules, host=address, authorization=BEARER).status_code == 200
        answer = ask(rules, host="nas.lan:8000", authorization=BEARER)
        assert refusal(answer)[1] == "foreign_host"
    one = access_rules("192.168.1.7", token=TOKEN)
    assert ask(one, host="192.168.1.7:8000", authorization=BEARER).status_code == 200
    assert refusal(ask(one, host="192.168.1.8", authorization=BEARER))[1] == "foreign_host"


def test_serving_other_machines_requires_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.7", "nas.lan"):
        with pytest.raises(BadConfig):
            access_rules(host)
        assert access_rules(host, token=TOKEN).token == TOKEN


def test_the_page_and_programs_can_send_requests() -> None:
    rules = access_rules("127.0.0.1")
    own = {"origin": f"http://{HOST}", "sec_fetch_site": "same-origin"}
    assert ask(rules, "/v1/query", "POST", **own).status_code == 200
    assert ask(rules, "/v1/query", "POST").status_code == 200
    assert ask(rules, sec_fetch_site="none").status_code == 200


def test_behind_a_proxy_the_pages_origin_may_be_https() -> None:
    rules = access_rules("127.0.0.1", ["photos.example"])
    asked = {"host": "photos.example", "origin": "https://photos.example"}
    assert ask(rules, "/v1/query", "POST", **asked).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://127.0.0.1:9000",
        "http://127.0.0.1",
        "http://localhost:8000",
        "https://evil.example:8000",
        "null",
        "file://",
        "http://127.0.0.1:8000, http://evil.example",
        "http://[",
        "chrome-extension://abcdef",
    ],
)
def test_other_sites_cannot_send_requests(origin: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        answer = ask(access_rules("127.0.0.1"), "/v1/query", method, origin=origin)
        assert refusal(answer) == (403, "foreign_origin")
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("site", ["cross-site", "same-site", "unheard-of"])
def test_other_sites_cannot_embed_images_or_scripts(site: str) -> None:
    for path in ("/v1/gallery", "/static/main.js", "/healthz", "/"):
        answer = ask(access_rules("127.0.0.1"), path, sec_fetch_site=site, sec_fetch_mode="no-cors")
        assert refusal(answer) == (403, "foreign_origin")


def test_other_sites_can_link_to_the_page_but_not_frame_it_or_call_the_api() -> None:
    rules = access_rules("127.0.0.1")
    visit = {
        "sec_fetch_site": "cross-site",
        "sec_fetch_mode": "navigate",
        "sec_fetch_dest": "document",
    }
    assert ask(rules, "/", **visit).status_code == 200
    assert refusal(ask(rules, "/v1/gallery", **visit))[1] == "foreign_origin"
    assert refusal(ask(rules, "/", "POST", **visit))[1] == "foreign_origin"
    framed = visit | {"sec_fetch_dest": "iframe"}
    assert refusal(ask(rules, "/", **framed))[1] == "foreign_origin"


def test_head_is_accepted_and_refused_like_get() -> None:
    open_to_all, closed = access_rules("127.0.0.1"), access_rules("0.0.0.0", token=TOKEN)
    visit = {
        "sec_fetch_site": "cross-site",
        "sec_fetch_mode": "navigate",
        "sec_fetch_dest": "document",
    }
    for rules, path, headers in (
        (open_to_all, "/", {}),
        (open_to_all, "/", visit),
        (open_to_all, "/v1/gallery", visit),
        (open_to_all, "/v1/gallery", {"origin": "http://evil.example"}),
        (open_to_all, "/healthz", {"host": "evil.example"}),
        (closed, "/healthz", {}),
        (closed, "/v1/gallery", {}),
        (closed, "/v1/gallery", {"authorization": BEARER}),
        (closed, f"/?token={TOKEN}", {}),
        (closed, "/?token=wrong-token", {}),
    ):
        get, head = (ask(rules, path, method, **headers) for method in ("GET", "HEAD"))
        assert head.status_code == get.status_code, (path, headers)
        assert head.headers == get.headers


def test_without_the_token_only_health_is_available() -> None:
    rules = access_rules("0.0.0.0", token=TOKEN)
    for path in ("/", "/v1/gallery", "/static/main.js", "/nothing/here"):
        answer = ask(rules, path)
        assert refusal(answer) == (401, "no_token")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert TOKEN not in answer.text
    assert ask(rules, "/healthz").text == "reached, trusted: False"
    assert ask(access_rules("127.0.0.1"), "/healthz").text == "reached, trusted: True"


def test_errors_are_pages_for_browsers_and_json_for_programs() -> None:
    rules = access_rules("0.0.0.0", token=TOKEN)
    browser = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    for path, message, is_wrong in (
        ("/", "This server requires a token.", False),
        ("/collection", "This server requires a token.", False),
        ("/docs", "This server requires a token.", False),
        ("/?token=wrong-token", "The token is wrong.", True),
    ):
        answer = ask(rules, path, **browser)
        assert answer.status_code == 401
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert f' id="message">{message}</p>' in answer.text
        assert "<form" in answer.text
        assert ('aria-invalid="true"' in answer.text) == is_wrong
        style = answer.text.partition("<style>")[2].partition("</style>")[0]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
        assert TOKEN not in answer.text
    assert refusal(ask(rules, "/v1/gallery", **browser)) == (401, "no_token")
    assert refusal(ask(rules, "/")) == (401, "no_token")


def test_a_program_sends_the_token_in_a_header() -> None:
    rules = access_rules("0.0.0.0", token=TOKEN)
    for given in (f"Bearer {TOKEN}", f"bearer {TOKEN}"):
        assert ask(rules, "/healthz", authorization=given).text == "reached, trusted: True"
    for given in (TOKEN, "Bearer", "Bearer x", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer é"):
        assert refusal(ask(rules, authorization=given)) == (401, "no_token")
    wrong = {"authorization": "Bearer wrong-token"}
    assert ask(rules, "/healthz", **wrong).text == "reached, trusted: False"


def test_a_browser_sends_the_token_once_and_then_a_cookie() -> None:
    rules = access_rules("0.0.0.0", token=TOKEN)
    answer = ask(rules, f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert answer.headers["cache-control"] == "no-store"
    shown = cookie.partition(";")[0]
    assert ask(rules, cookie=shown).status_code == 200
    assert ask(rules, cookie=f"theme={{dark}}; {shown}; other=1").status_code == 200
    assert refusal(ask(rules, cookie=shown + "x")) == (401, "no_token")
    assert refusal(ask(rules, cookie=f"token={TOKEN}")) == (401, "no_token")


def test_over_https_the_cookie_is_secure() -> None:
    rules = access_rules("0.0.0.0", token=TOKEN)
    direct = ask(rules, f"/?token={TOKEN}", origin_of_url="https://server")
    behind_a_proxy = ask(rules, f"/?token={TOKEN}", x_forwarded_proto="https")
    for answer in (direct, behind_a_proxy):
        assert "Secure" in answer.headers["set-cookie"].split("; ")


def test_a_wrong_token_in_the_address_gives_no_cookie() -> None:
    rules = access_rules("0.0.0.0", token=TOKEN)
    for wrong in ("/?token=", "/?token=wrong", f"/?token={TOKEN}%00", f"/v1/gallery?token={TOKEN}"):
        answer = ask(rules, wrong)
        assert refusal(answer) == (401, "no_token")
        assert "set-cookie" not in answer.headers


def test_a_link_with_the_token_works_from_another_site() -> None:
    # Browsers do not send a new SameSite=Strict cookie along such a redirect.
    rules = access_rules("0.0.0.0", token=TOKEN)
    visit = {
        "sec_fetch_site": "cross-site",
        "sec_fetch_mode": "navigate",
        "sec_fetch_dest": "document",
    }
    answer = ask(rules, f"/?token={TOKEN}", **visit)
    assert answer.status_code == 200
    assert "set-cookie" in answer.headers
    assert 'content="0; url=./"' in answer.text
    assert TOKEN not in answer.text


def test_servers_with_other_tokens_have_other_cookies() -> None:
    first = ask(access_rules("0.0.0.0", token=TOKEN), f"/?token={TOKEN}")
    second = ask(access_rules("0.0.0.0", token="another-token"), "/?token=another-token")
    names = {answer.headers["set-cookie"].partition("=")[0] for answer in (first, second)}
    assert len(names) == 2


def test_short_tokens_and_tokens_unfit_for_cookies_are_refused() -> None:
    for token in ("", "short", "with space in", "semi;colon;s", "x" * 257, "line\nend-of-token"):
        with pytest.raises(BadConfig):
            access_rules("127.0.0.1", token=token)
    made = {new_token() for _ in range(8)}
    assert len(made) == 8
    for token in made:
        assert access_rules("127.0.0.1", token=token).token == token


def test_invalid_hosts_are_refused() -> None:
    for host in ("http://photos.example", "a b", "", "photos.example/x"):
        with pytest.raises(BadConfig):
            access_rules("127.0.0.1", [host])


def test_only_loopback_addresses_need_no_token() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.1.7", "nas.lan", "localhost.example"):
        assert not is_loopback(host)


def test_every_response_has_security_headers() -> None:
    rules = access_rules("127.0.0.1")
    for answer in (ask(rules), ask(rules, "/nothing"), ask(rules, host="evil.example")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cache-control"] in ("private, no-cache", "no-store")
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert ask(rules, "/").headers["content-security-policy"] == PAGE_POLICY
    assert ask(rules, "/static/main.js").headers["content-security-policy"] == PAGE_POLICY
    assert ask(rules, "/v1/gallery").headers["content-security-policy"] == DATA_POLICY
    assert "unsafe" not in PAGE_POLICY
    assert "script" not in DATA_POLICY


def test_websockets_are_closed() -> None:
    sent = []

    async def try_one() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def send(message: object) -> None:
            sent.append(message)

        guard = AccessGuard(Starlette(), access_rules("127.0.0.1"))
        await guard({"type": "websocket", "path": "/", "headers": []}, receive, send)

    asyncio.run(try_one())
    assert sent == [{"type": "websocket.close", "code": 1008}]

"""The state machine of a key in a Redis ledger: one string per key, one script, one key per call.

    value                        | state
    -----------------------------+---------------------------------------------------------------
    (absent)                     | nothing is known
    ``O|lost|task|source``       | open: released; maybe charged `lost` times, maybe a task
    ``C|token|lost|task|source`` | claimed by the worker in the token, ``worker#number``
    ``F|lost|task|secs|payload`` | failed permanently
    ``A|lost|task|secs|payload`` | answered

``source`` is that of the first claim of a named item. ``lost`` counts the requests that may have
been charged without a response. Each step is idempotent for the same token, so it can be sent again
when its reply is lost.

    step      | rule
    ----------+--------------------------------------------------------------------------------
    claim     | absent, O -> C. C of the same token: granted. C of a dead worker -> C, lost + 1
              | unless a task is known. Otherwise denied
    submitted | A, F: ignored. Own token or O: replaces the task. C of another: only if no task
              | is known
    answer    | the first A wins, from any token. F never replaces A or F. A replaces F
    release   | own token only: -> O, lost + 1 if ambiguous and no task. Nothing known -> absent.
              | An ambiguous release of an absent key -> O: Redis lost the claim
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote, unquote_to_bytes

import attrs

# ARGV: step, milliseconds to keep an answer (0: no limit), token, and what the step needs. Claims do
# not expire by time, because a task may take longer than that.
# The reply to a claim is the value of the key after it; of a final value, only the state. An
# unreadable value is not changed, except by an answer.
SCRIPT: Final = """
local key, step, keep, own = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local state = redis.call('GETRANGE', key, 0, 0)
local token, lost, task, source = '', 0, '', ''
if state == 'C' then
  token, lost, task, source =
    string.match(redis.call('GET', key), '^C|([^|]*)|(%d+)|([^|]*)|(.*)$')
elseif state == 'O' or (state == 'F' and step == 'A') then
  lost, task, source = string.match(redis.call('GET', key), '^.|(%d+)|([^|]*)|(.*)$')
end
if not lost or not string.find('CFAO', state, 1, true) then
  -- damaged, or of another version: nothing but an answer replaces it
  if step ~= 'A' and step ~= 'F' then return redis.call('GET', key) end
  token, lost, task = '', 0, ''
end
local final = state == 'A' or state == 'F'
local mine = state == 'C' and token == own
local function put(value) redis.call('SET', key, value) end
local function hold(owner)
  local value = 'C|' .. owner .. '|' .. lost .. '|' .. task .. '|' .. source
  put(value)
  return value
end
local function open()
  if tonumber(lost) == 0 and task == '' and source == '' then redis.call('DEL', key)
  else put('O|' .. lost .. '|' .. task .. '|' .. source) end
end

if step == 'claim' then
  if final then return state end
  if state == 'C' and not mine then
    if string.match(token, '^[^#]*') ~= ARGV[4] then return redis.call('GET', key) end
    if task == '' then lost = lost + 1 end
  end
  if source == '' then source = ARGV[5] or '' end
  return hold(own)
elseif step == 'submitted' then
  if final or (state == 'C' and not mine and (task ~= '' or ARGV[4] == '')) then return 0 end
  task = ARGV[4]
  if state == 'C' then hold(token) else open() end
  return 1
elseif step == 'release' then
  if mine or (state == '' and ARGV[4] == '1') then
    if ARGV[4] == '1' and task == '' then lost = lost + 1 end
    open()
    return 1
  end
  return 0
elseif step == 'A' or step == 'F' then
  if state == 'A' or (state == 'F' and step == 'F') then return 0 end
  put(step .. '|' .. lost .. '|' .. task .. '|' .. ARGV[4])
  if keep ~= '0' then redis.call('PEXPIRE', key, keep) end
  return 1
end
return redis.error_reply('ERR unknown step')
"""


@attrs.frozen(kw_only=True)
class KeyState:
    """The content of the value of a key.

    Attributes:
        state: ``O``, ``C``, ``A`` or ``F``.
        token: The token of the claim.
        lost: How often the request may have been charged without a response.
        task_id: The submitted task.
        source: The source of a named item, until there is a response.
        seconds: How long the attempts took.
        payload: The response or error.
    """

    state: str
    token: str = ""
    lost: int = 0
    task_id: str | None = None
    source: str | None = None
    seconds: float = 0.0
    payload: bytes = b""


def read_state(value: bytes) -> KeyState:
    """Read the value of a key.

    Raises:
        ValueError: The value has another form.
    """
    state = value[:1].decode(errors="replace")
    match state:
        case "O":
            _, lost, task, source = value.split(b"|", 3)
            token = b""
        case "C":
            _, token, lost, task, source = value.split(b"|", 4)
        case "A" | "F":
            _, lost, task, seconds, payload = value.split(b"|", 4)
            return KeyState(
                state=state,
                lost=int(lost),
                task_id=decode_task(task),
                seconds=float(seconds),
                payload=payload,
            )
        case _:
            raise ValueError(f"a value in an unexpected shape: {value[:40]!r}")
    return KeyState(
        state=state,
        token=token.decode(),
        lost=int(lost),
        task_id=decode_task(task),
        source=source.decode() or None,
    )


def encode_task(task_id: str | None) -> str:
    """Return a task id as a part of a value. It may contain any character."""
    return "" if task_id is None else quote(task_id, safe="", errors="surrogatepass")


def decode_task(part: Any) -> str | None:
    """Return the task id; see `encode_task`."""
    return unquote_to_bytes(part).decode(errors="surrogatepass") or None


def build_answer(seconds: float, payload: bytes) -> bytes:
    """Return the part after the task in the value of an answered or failed key."""
    return f"{seconds:.6g}|".encode() + payload

// The gateway's status page: shows GET /api/status, and chats through POST /v1/chat/completions.
//
// Owns what a person sees. Keeps no prompt and no answer beyond the page's life; the local key, where
// the gateway has one, stays in this tab's session. Everything that comes from outside is put in as
// text, never as markup; the page's Content-Security-Policy holds it to that.

const STATUS_EVERY_MS = 5000;
const STATUS_WHILE_WAITING_MS = 2000;
const STATUS_TIMEOUT_MS = 15_000;
const LISTED = 20;
const CLIENT_LEFT = 499; // how the gateway counts a request whose client went away first
const KEY = "sealed-vllm local key";
const GONE = "The gateway does not answer. This page keeps asking; is it still running?";

const part = (id) => document.getElementById(id);

// -- the gateway ---------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

class GatewayGone extends Error {}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new GatewayGone(GONE);
  }
  if (response.ok) return response;
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not the gateway's own error: the status says what there is to say.
  }
  throw new Refused(response.status, message || `The gateway answered ${response.status}.`);
}

// The events of a stream: {data} for each message, {comment} for each keep-alive.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A CR at the end may be the first half of a CR LF.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith(":")) {
          yield { comment: true };
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length) {
          yield { data: data.join("\n") };
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// -- words ---------------------------------------------------------------------------------------

function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  const seconds = Math.round(ms / 1000);
  return `${Math.floor(seconds / 60)} min ${String(seconds % 60).padStart(2, "0")} s`;
}

function clock(ms) {
  const seconds = Math.floor(ms / 1000);
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

// -- status --------------------------------------------------------------------------------------

let known = null; // the last status that came
let lost = ""; // why the next one did not
let refused = false; // whether it was for want of the right key

function state() {
  if (lost) return "lost";
  if (!known) return "unknown";
  if (known.awake === null) return "cut";
  if (known.awake) return "awake";
  return known.workers?.initializing ? "starting" : "asleep";
}

const STATES = {
  unknown: ["Looking …", ""],
  awake: [
    "Awake",
    "A worker is awake. What you write is sealed here and opened only in the worker’s process.",
  ],
  starting: ["Starting", "A worker is starting. A message sent now waits for it."],
  asleep: [
    "Asleep",
    "No worker is awake, so no GPU is billed. Your first message wakes one, which takes from " +
      "half a minute to several minutes.",
  ],
  cut: ["Endpoint unreachable", "Messages fail until the endpoint can be reached again."],
  lost: ["Gateway unreachable", "Messages fail until the gateway can be reached again."],
};

let looking = null; // {key, done}: the look that is under way, and the key it was begun with

function look() {
  const key = sessionStorage.getItem(KEY);
  if (looking?.key !== key || looking === null) {
    const mine = { key };
    looking = mine;
    mine.done = ask(mine).finally(() => {
      if (looking === mine) looking = null;
    });
  }
  return looking.done;
}

async function ask(mine) {
  let status = null;
  let fault = null;
  try {
    const response = await call("/api/status", { signal: AbortSignal.timeout(STATUS_TIMEOUT_MS) });
    status = await response.json();
  } catch (error) {
    fault = error;
  }
  // Of an answer to another key, nothing is shown.
  if (looking !== mine) return;
  if (status) {
    known = status;
    lost = "";
    refused = known.needs_key === true && !mine.key;
    put("key-fault", "");
  } else if (fault instanceof Refused && fault.status === 401) {
    refuseKey();
  } else {
    lost = fault instanceof Refused ? fault.message : GONE;
  }
  show();
}

function refuseKey() {
  if (sessionStorage.getItem(KEY)) put("key-fault", "The gateway refused this key.");
  sessionStorage.removeItem(KEY);
  known = null;
  lost = "";
  refused = true;
}

function show() {
  const now = state();
  const [title, sentence] = STATES[now];
  put("state", refused ? "Locked" : title);
  part("state").dataset.state = refused ? "unknown" : now;
  put("notice", lost || (now === "cut" && `The endpoint cannot be reached: ${known.error}`) || "");
  part("notice").hidden = !part("notice").textContent;
  put("empty", sentence);

  part("key-form").hidden = !refused;
  part("inside").hidden = refused;
  part("lock").hidden = !sessionStorage.getItem(KEY);
  put("base-url", known?.base_url ?? `${location.origin}/v1`);
  put(
    "api-key-hint",
    refused || known?.needs_key
      ? "The tool’s API key is the gateway’s local key."
      : "The tool’s API key can be any text.",
  );

  const workers = known?.workers ?? {};
  const jobs = known?.jobs ?? {};
  tell("idle", workers.idle);
  tell("running", workers.running);
  tell("starting", workers.initializing);
  tell("queued", jobs.inQueue);
  tell("working", jobs.inProgress);
  const troubled = [
    workers.throttled ? `${workers.throttled} without a free GPU` : "",
    workers.unhealthy ? `${workers.unhealthy} unhealthy` : "",
  ].filter(Boolean);
  put("troubled", troubled.join(" · "));

  tell("endpoint", known?.endpoint);
  tell("key-id", known?.key_id);
  tell("models", known?.models?.join("\n"), known ? "told by the first worker" : "–");
  tell("worker", worker(known?.worker), known ? "not asked yet" : "–");
  tell("gateway", known?.version);
  tell("transport", known?.transport);
  offer(known?.models ?? []);
  list(known?.requests ?? []);
  composed();
}

// Only what changed: a screen reader would say the rest again, and a selection would be lost.
function put(id, text) {
  if (part(id).textContent !== text) part(id).textContent = text;
}

// A fact, or what stands in its place while it is not known.
function tell(id, value, otherwise = "–") {
  const unknown = value === null || value === undefined || value === "";
  put(id, unknown ? otherwise : String(value));
  part(id).classList.toggle("muted", unknown);
}

function worker(told) {
  if (!told) return "";
  const parts = [told.worker, told.vllm && `vLLM ${told.vllm}`];
  return parts.filter(Boolean).join(", ") || "of an unknown version";
}

function offer(models) {
  const select = part("model");
  const offered = models.length ? models : ["the worker’s model"];
  if (offered.join("\n") !== [...select.options].map((option) => option.text).join("\n")) {
    const chosen = select.value;
    select.replaceChildren(
      ...offered.map((name) => new Option(name, models.length ? name : "", false, name === chosen)),
    );
  }
  select.disabled = models.length === 0;
}

let listed = "";

function list(requests) {
  const text = JSON.stringify(requests);
  if (text === listed) return;
  listed = text;
  part("no-requests").hidden = requests.length > 0;
  part("requests").hidden = requests.length === 0;
  part("request-rows").replaceChildren(...requests.slice(0, LISTED).map(row));
}

function row(request) {
  const line = document.createElement("tr");
  line.setAttribute("role", "row");
  // Where the table has no head, on a narrow screen, the words around a number come from `words`.
  const cell = (text, style, words = {}) => {
    const made = element("td", style, text);
    made.setAttribute("role", "cell");
    if (text === "–") made.classList.add("unknown");
    Object.assign(made.dataset, words);
    line.append(made);
  };
  cell(new Date(request.time * 1000).toLocaleTimeString(), "time");
  cell(request.route, "route");
  if (request.status === CLIENT_LEFT) {
    cell("stopped", "status");
  } else {
    cell(request.status, request.status >= 400 ? "status failed" : "status");
  }
  cell(duration(request.first_ms), "number", { before: "first" });
  cell(duration(request.total_ms), "number", { before: "total" });
  cell(request.tokens ?? "–", "number", { after: request.tokens === 1 ? "token" : "tokens" });
  return line;
}

// -- chat ----------------------------------------------------------------------------------------

let turns = []; // {said, text, kept, view}; kept: whether the next question carries it
let running = null; // the AbortController of the answer that is being read

function messages(turn) {
  const before = turns.slice(0, turns.indexOf(turn)).filter((each) => each.kept);
  return [
    ...before.flatMap((each) => [
      { role: "user", content: each.said },
      { role: "assistant", content: each.text },
    ]),
    { role: "user", content: turn.said },
  ];
}

function element(name, style, text = "") {
  const made = document.createElement(name);
  made.className = style;
  made.textContent = text;
  return made;
}

function begin(said) {
  part("empty").hidden = true;
  const turn = { said, text: "", kept: false, view: element("div", "turn") };
  turns.push(turn);
  part("log").append(element("p", "said", said), turn.view);
  return turn;
}

// What stands while nothing has come: what is waited for, since when, and why it takes so long.
function waiting(started) {
  const view = element("div", "waiting");
  const now = element("p", "now");
  const what = element("span", "");
  const time = element("span", "clock");
  const why = element("p", "why");
  time.setAttribute("aria-hidden", "true");
  now.append(what, time);
  view.append(now, why);
  const tick = () => {
    const [doing, reason] = expectation();
    if (what.textContent !== doing) {
      what.textContent = doing;
      speak(`${doing}. ${reason}`);
    }
    why.textContent = reason;
    time.textContent = clock(performance.now() - started);
  };
  tick();
  const timer = setInterval(tick, 1000);
  return {
    view,
    end() {
      clearInterval(timer);
      view.remove();
    },
  };
}

function expectation() {
  const workers = known?.workers ?? {};
  if (workers.initializing && !known.awake) {
    return ["A worker is starting", "It loads the model into the GPU, which can take minutes."];
  }
  if (known?.awake === false) {
    return ["Waiting for a worker", "The endpoint was asleep; the platform is finding a GPU."];
  }
  if (known?.jobs?.inQueue && !workers.idle) {
    return ["Waiting in the queue", `${count(known.jobs.inQueue, "job")} in the queue.`];
  }
  return ["Waiting for the first token", ""];
}

async function answer(turn) {
  const started = performance.now();
  const mine = new AbortController();
  running = mine;
  composed();
  turn.text = "";
  turn.kept = false;
  turn.view.replaceChildren();
  const wait = waiting(started);
  turn.view.append(wait.view);
  follow(true);
  look();
  const watch = setInterval(look, STATUS_WHILE_WAITING_MS);

  const text = element("p", "answer");
  let thought = null;
  let first_ms = null;
  let usage = null;
  let reason = null;
  const show = (target, piece) => {
    const following = atEnd();
    if (first_ms === null) {
      first_ms = performance.now() - started;
      clearInterval(watch);
      wait.end();
      turn.view.append(text);
      speak("The answer begins.");
    }
    target.append(piece);
    follow(following);
  };
  const think = () => {
    if (!thought) {
      const view = element("details", "");
      thought = element("div", "thought");
      view.append(element("summary", "", "Reasoning"), thought);
      turn.view.prepend(view);
    }
    return thought;
  };

  let below = "";
  let fault = "";
  try {
    const model = part("model").value;
    const body = {
      ...(model && { model }),
      messages: messages(turn),
      stream: true,
      stream_options: { include_usage: true },
    };
    const response = await call("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: mine.signal,
    });
    let whole = false;
    for await (const event of events(response.body)) {
      if (event.comment) continue;
      if (event.data === "[DONE]") {
        whole = true;
        continue;
      }
      const chunk = JSON.parse(event.data);
      if (chunk.error) throw new Refused(chunk.error.code, chunk.error.message || "The answer failed.");
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      const reasoning = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content;
      if (reasoning) show(think(), reasoning);
      if (choice?.delta?.content) {
        turn.text += choice.delta.content;
        show(text, choice.delta.content);
      }
      reason = choice?.finish_reason ?? reason;
    }
    if (!whole) throw new Error("The answer broke off: its end never came.");
    turn.kept = true;
    below = [
      usage && count(usage.completion_tokens, "token"),
      first_ms !== null && `first after ${duration(first_ms)}`,
      `${duration(performance.now() - started)} in all`,
      reason === "length" && "cut at the longest length",
    ]
      .filter(Boolean)
      .join(" · ");
    speak(turn.text || "The answer is empty.");
  } catch (error) {
    if (mine.signal.aborted) {
      turn.kept = turn.text !== "";
      below = `Stopped after ${duration(performance.now() - started)}`;
      speak("Stopped.");
    } else if (error instanceof Refused && error.status === 401) {
      refuseKey();
      fault = "The gateway asks for its local key.";
    } else if (error instanceof Refused || error instanceof GatewayGone) {
      fault = error.message;
    } else if (error instanceof SyntaxError) {
      fault = "The gateway sent something that is not an answer.";
    } else {
      fault = error instanceof TypeError ? "The connection to the gateway broke off." : error.message;
    }
  } finally {
    clearInterval(watch);
    wait.end();
    if (running === mine) running = null;
  }
  const following = atEnd();
  if (below) turn.view.append(element("p", "below", below));
  if (fault) turn.view.append(...failure(turn, fault));
  follow(following);
  if (document.activeElement === document.body || document.activeElement === part("stop")) {
    part("message").focus();
  }
  composed();
  look();
}

function failure(turn, fault) {
  const again = element("button", "", "Try again");
  again.type = "button";
  again.addEventListener("click", () => {
    // What was asked since stands below; asked again, this one comes last.
    if (running) return;
    part("log").append(turn.view.previousSibling, turn.view);
    turns = [...turns.filter((each) => each !== turn), turn];
    part("message").focus();
    answer(turn);
  });
  const line = element("p", "fault", fault);
  line.setAttribute("role", "alert");
  return [line, again];
}

function speak(text) {
  put("spoken", text);
}

function atEnd() {
  const log = part("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 48;
}

function follow(following) {
  if (following) part("log").scrollTop = part("log").scrollHeight;
}

function composed() {
  part("send").hidden = running !== null;
  part("stop").hidden = running === null;
  part("send").disabled = part("message").value.trim() === "";
  part("clear").disabled = turns.length === 0;
}

function send() {
  const said = part("message").value.trim();
  if (!said || running) return;
  part("message").value = "";
  answer(begin(said));
}

function stop() {
  running?.abort();
}

// -- what a person does --------------------------------------------------------------------------

part("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
part("message").addEventListener("input", composed);
part("message").addEventListener("keydown", (event) => {
  // Enter also ends the composition of a character.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
part("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});
part("clear").addEventListener("click", () => {
  stop();
  turns = [];
  part("log").replaceChildren(part("empty"));
  part("empty").hidden = false;
  part("message").focus();
  composed();
});

part("copy").addEventListener("click", async () => {
  const selection = getSelection();
  selection.selectAllChildren(part("base-url"));
  let done = "Copied";
  try {
    await navigator.clipboard.writeText(part("base-url").textContent);
  } catch {
    // No clipboard off loopback without TLS: the text is selected, ready to be copied by hand.
    done = "Selected";
  }
  part("copy").textContent = done;
  setTimeout(() => (part("copy").textContent = "Copy"), 2000);
});

part("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = part("key");
  sessionStorage.setItem(KEY, field.value.trim());
  field.value = "";
  await look();
  (refused ? field : part("message")).focus();
});
part("lock").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  stop();
  look();
});

async function watch() {
  if (!document.hidden && !refused) await look();
  setTimeout(watch, STATUS_EVERY_MS);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) look();
});
// A page that comes back from the browser's history would show the conversation again.
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});
show();
watch();

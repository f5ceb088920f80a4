// openai-node against the gateway: `node openai_node.mjs [SCENARIO...]`, one line of JSON each.
// The same in form and environment as harness.py and openai_python.py, which say more.

import OpenAI from "openai";

const { BASE_URL, API_KEY, MODEL } = process.env;
const MANY = 32;
const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY });

const SCHEMA = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, warm: { type: "boolean" } },
  required: ["city", "warm"],
  additionalProperties: false,
};
const TOOLS = {
  tools: [{ type: "function", function: { name: "weather", parameters: SCHEMA } }],
  tool_choice: { type: "function", function: { name: "weather" } },
};

const prompt = (name, text = "Tell me about the sea.") =>
  `My name is tourmaline-openai_node-${name}. ${text}`;
const said = (name, number) =>
  `Number ${number} of openai_node ${name} says ${number * number}.`;
const asked = (name, options = {}) => ({
  model: MODEL,
  messages: [{ role: "user", content: prompt(name) }],
  temperature: 0,
  max_tokens: 40,
  ...options,
});

const factsOf = (completion) => ({
  choices: completion.choices.map((choice) => ({
    text: choice.message.content ?? "",
    tools: (choice.message.tool_calls ?? []).map((call) => [
      call.function.name,
      call.function.arguments,
    ]),
    finish: choice.finish_reason,
  })),
  usage: completion.usage,
});

async function gathered(stream) {
  const choices = [];
  const facts = { chunks: 0 };
  for await (const chunk of stream) {
    facts.chunks += 1;
    if (chunk.usage) {
      facts.usage = chunk.usage;
      facts.choices_beside_usage = chunk.choices.length;
    }
    for (const piece of chunk.choices) {
      const choice = (choices[piece.index] ??= { text: "", tools: [], finish: null });
      choice.text += piece.delta.content ?? "";
      choice.finish = piece.finish_reason ?? choice.finish;
      for (const call of piece.delta.tool_calls ?? []) {
        if (call.function.name) {
          if (call.index !== choice.tools.length || !call.id) throw new Error("no index or no id");
          choice.tools.push([call.function.name, ""]);
        }
        choice.tools[call.index][1] += call.function.arguments ?? "";
      }
    }
  }
  return { ...facts, choices };
}

async function raised(type, call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof type)) throw error;
    const { status = null, code, message, error: body } = error;
    return { error: type.name, status, code, message: body?.message ?? message, body };
  }
  return { error: null };
}

async function chat(name, options) {
  const body = asked(name, options);
  return { asked: body, ...factsOf(await client.chat.completions.create(body)) };
}

async function streamed(name, options) {
  const body = asked(name, { stream: true, ...options });
  return { asked: body, ...(await gathered(await client.chat.completions.create(body))) };
}

const scenarios = {
  async models() {
    const models = [];
    for await (const model of client.models.list()) models.push(model.id);
    return { models };
  },
  chat: () => chat("chat"),
  chat_streamed: () => streamed("chat_streamed"),
  usage_chunk: () => streamed("usage_chunk", { stream_options: { include_usage: true } }),
  choices: () => chat("choices", { n: 2, seed: 7, temperature: 1 }),
  async logprobs() {
    const body = asked("logprobs", { logprobs: true, top_logprobs: 2 });
    const completion = await client.chat.completions.create(body);
    const entries = completion.choices[0].logprobs.content;
    return {
      asked: body,
      tokens: entries.map((entry) => entry.token),
      tops: entries.map((entry) => entry.top_logprobs.length),
      ...factsOf(completion),
    };
  },
  stop: () =>
    chat("stop", {
      stop: [" three"],
      structured_outputs: { choice: ["one two three four"] },
    }),
  async schema() {
    const format = { type: "json_schema", json_schema: { name: "weather", schema: SCHEMA } };
    const facts = await chat("schema", { max_tokens: 150, response_format: format });
    return { ...facts, parsed: JSON.parse(facts.choices[0].text) };
  },
  tool: () => chat("tool", { max_tokens: 150, ...TOOLS }),
  tool_streamed: () => streamed("tool_streamed", { max_tokens: 150, ...TOOLS }),
  async completion() {
    const given = prompt("completion", "The sea is a");
    const body = { model: MODEL, prompt: given, temperature: 0, max_tokens: 40 };
    const { choices } = await client.completions.create(body);
    return {
      asked: body,
      choices: choices.map((choice) => ({ text: choice.text, finish: choice.finish_reason })),
    };
  },
  async responses() {
    const body = { model: MODEL, input: prompt("responses"), temperature: 0, max_output_tokens: 40 };
    const response = await client.responses.create(body);
    return { asked: body, text: response.output_text, status: response.status };
  },
  async responses_streamed() {
    const body = {
      model: MODEL,
      input: prompt("responses_streamed"),
      temperature: 0,
      max_output_tokens: 40,
      stream: true,
    };
    const deltas = [];
    const kinds = [];
    let status;
    for await (const event of await client.responses.create(body)) {
      kinds.push(event.type);
      if (event.type === "response.output_text.delta") deltas.push(event.delta);
      status = event.response?.status ?? status;
    }
    return { asked: body, kinds, chunks: deltas.length, text: deltas.join(""), status };
  },
  unknown_model: () =>
    raised(OpenAI.NotFoundError, () => chat("unknown_model", { model: "nobody" })),
  too_long: () =>
    raised(OpenAI.BadRequestError, () =>
      chat("too_long", { messages: [{ role: "user", content: prompt("too_long").repeat(400) }] }),
    ),
  wrong_key: () =>
    raised(OpenAI.AuthenticationError, () =>
      new OpenAI({ baseURL: BASE_URL, apiKey: "wrong" }).chat.completions.create(asked("wrong_key")),
    ),
  async cancelled() {
    const body = asked("cancelled", { max_tokens: 1500, ignore_eos: true, stream: true });
    const stream = await client.chat.completions.create(body);
    let chunks = 0;
    for await (const _ of stream) if (++chunks === 3) break;
    return { chunks };
  },
  async many() {
    const one = async (number) => {
      const structured_outputs = { choice: [said("many", number)] };
      const { choices } = await streamed("many", { max_tokens: 150, structured_outputs });
      return choices[0].text;
    };
    return { texts: await Promise.all(Array.from({ length: MANY }, (_, number) => one(number))) };
  },
  async broken() {
    let text = "";
    const facts = await raised(OpenAI.APIError, async () => {
      const body = asked("broken", { max_tokens: 300, stream: true });
      for await (const chunk of await client.chat.completions.create(body)) {
        text += chunk.choices[0]?.delta.content ?? "";
      }
    });
    return { text, ...facts };
  },
  async embeddings() {
    const input = [prompt("embeddings", "First."), prompt("embeddings", "Second.")];
    // Without a format the SDK asks for base64 and decodes it.
    const packed = await client.embeddings.create({ model: MODEL, input });
    const floats = await client.embeddings.create({ model: MODEL, input, encoding_format: "float" });
    return {
      asked: { model: MODEL, input },
      packed: packed.data.map((entry) => entry.embedding),
      floats: floats.data.map((entry) => entry.embedding),
    };
  },
};

const names = process.argv.slice(2);
for (const name of names.length ? names : Object.keys(scenarios)) {
  let facts;
  try {
    facts = await scenarios[name]();
  } catch (error) {
    facts = { raised: String(error), where: error.stack };
  }
  console.log(JSON.stringify({ scenario: name, ...facts }));
}

// What a user of OpenAI's JavaScript SDK does, unmodified; says as JSON what came of it.
// node sdk.mjs URL KEY BASE TRAINING_FILE
import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const [url, apiKey, base, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const said = {};
const messages = [{ role: "user", content: "Hello there" }];
const greedy = { model: base, messages, max_tokens: 8, temperature: 0 };

// files, and one in parts
const file = await client.files.create({ file: fs.createReadStream(path), purpose: "fine-tune" });
const small = await client.files.create({ file: await toFile(Buffer.from("abc"), "größe.txt"), purpose: "user_data" });
said.filename = (await client.files.retrieve(small.id)).filename;
said.content = await (await client.files.content(small.id)).text();
said.deleted = (await client.files.delete(small.id)).deleted;
const bytes = fs.readFileSync(path);
const upload = await client.uploads.create({
  bytes: bytes.length, filename: "parts.jsonl", mime_type: "application/jsonl", purpose: "fine-tune",
});
const halves = [bytes.subarray(0, 100), bytes.subarray(100)];
const parts = [];
for (const half of halves) parts.push((await client.uploads.parts.create(upload.id, { data: await toFile(half) })).id);
const whole = (await client.uploads.complete(upload.id, { part_ids: parts })).file;
said.parts = Buffer.from(await (await client.files.content(whole.id)).arrayBuffer()).equals(bytes);
said.files = [];
for await (const each of client.files.list({ limit: 1 })) said.files.push(each.filename); // a page for each

// a job
let job = await client.fineTuning.jobs.create({
  model: base, training_file: file.id, suffix: "js", seed: 7, metadata: { from: "js" },
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1 } } },
});
while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
  await new Promise((resolve) => setTimeout(resolve, 50));
  job = await client.fineTuning.jobs.retrieve(job.id);
}
said.job = [job.status, job.metadata, job.seed];

// one that is paused, goes on, and is cancelled
const { jobs } = client.fineTuning;
const long = await jobs.create({
  model: base, training_file: file.id, method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 100, batch_size: 1 } } },
});
const until = async (status) => {
  while ((await jobs.retrieve(long.id)).status !== status) await new Promise((resolve) => setTimeout(resolve, 50));
};
await until("running");
said.states = [(await jobs.pause(long.id)).status, (await jobs.resume(long.id)).status, (await jobs.cancel(long.id)).status];
said.mine = [];
for await (const each of jobs.list({ metadata: { from: "js" } })) said.mine.push(each.id === job.id);
said.events = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id)) said.events.push(event.message);
said.checkpoints = [];
for await (const each of client.fineTuning.jobs.checkpoints.list(job.id)) said.checkpoints.push(each.object);
said.models = [];
for await (const model of client.models.list()) said.models.push(model.id);
said.model = (await client.models.retrieve(job.fine_tuned_model)).id === job.fine_tuned_model;

// answers, whole and streamed
const answer = await client.chat.completions.create(greedy);
said.answer = answer.choices[0].message.content;
said.requestId = answer._request_id.startsWith("req-");
const stream = await client.chat.completions.create({ ...greedy, stream: true, stream_options: { include_usage: true } });
said.streamed = "";
for await (const chunk of stream) {
  said.streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) said.usage = chunk.usage;
}
said.helper = await client.chat.completions.stream(greedy).finalContent();
said.tuned = (await client.chat.completions.create({ ...greedy, model: job.fine_tuned_model })).choices.length;
said.plain = (await client.completions.create({ model: base, prompt: "Once", max_tokens: 4, temperature: 0 })).choices[0].text;
const form = { type: "json_schema", json_schema: { name: "a", strict: true, schema: { type: "object", properties: { b: { enum: [1, 2] } }, required: ["b"], additionalProperties: false } } };
said.structured = JSON.parse((await client.chat.completions.create({ ...greedy, max_tokens: 40, response_format: form })).choices[0].message.content);
const tools = [{ type: "function", function: { name: "look_up", strict: true, parameters: { type: "object", properties: { what: { enum: ["tide"] } }, required: ["what"], additionalProperties: false } } }];
const called = await client.chat.completions.create({ ...greedy, max_tokens: 60, tools, tool_choice: "required" });
said.call = called.choices[0].message.tool_calls[0].function;
const left = await client.chat.completions.create({ ...greedy, max_tokens: 300, stream: true, ignore_eos: true });
for await (const _ of left) break; // hangs up

// errors
said.errors = {};
const wrong = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
for (const [name, ask] of Object.entries({
  model: () => client.chat.completions.create({ ...greedy, model: "nobody/nothing" }),
  field: () => client.chat.completions.create({ ...greedy, temperature: 9 }),
  key: () => wrong.models.list(),
  file: () => client.files.retrieve("file-1"),
})) {
  try {
    await ask();
  } catch (error) {
    said.errors[name] = [error.constructor.name, error.status, error.code, error.param];
  }
}
console.log(JSON.stringify(said));

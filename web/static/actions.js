// What can be done with an element, what is lost by it, and the request that does it.

import { bytes, plural } from "./format.js";

const path = encodeURIComponent;

async function send(method, url, body) {
  const answer = await fetch(url, {
    method, headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await answer.text();
  if (answer.ok) return text ? JSON.parse(text) : {};
  let message = `${answer.status} ${answer.statusText}`;
  try { message = JSON.parse(text).error.message; } catch { /* not from the API */ }
  throw new Error(message);
}

const own = (e) => `${bytes(e.allocated_bytes)} in ${plural(e.exceptions, "chunk")}`;
const clients = (e) => e.connections ? ` ${plural(e.connections, "client")} will be disconnected.` : "";
const nameField = (label) => ({ name: "name", label, pattern: "[A-Za-z0-9._\\-]{1,64}", hint: "letters, digits, dot, dash, underscore" });

// checkpointsOf are the ancestors of a node to which it can be rolled back.
function checkpointsOf(e, all) {
  const list = [];
  for (let p = all.get(e.parent); p && p.kind === "checkpoint"; p = all.get(p.parent)) if (!p.unnamed) list.push(p);
  return list;
}

const fleet = {
  fork: {
    title: (e) => `Fork ${e.name}`, ok: "Fork",
    text: (e) => e.kind === "node" ? `A new node begins with what ${e.name} shows now. ${e.name} and its clients continue.` : `A new node begins with what ${e.name} shows.`,
    fields: () => [nameField("Name of the new node")],
    do: (e, f) => send("POST", "/v1/fork", { from: e.name, name: f.name }),
  },
  checkpoint: {
    title: (e) => `Checkpoint of ${e.name}`, ok: "Make checkpoint",
    text: (e) => `What ${e.name} shows now is kept as ${e.name}@NAME. Its clients continue.`,
    fields: () => [nameField("Name of the checkpoint")],
    do: (e, f) => send("POST", "/v1/checkpoint", { nodes: [e.name], name: f.name }),
  },
  rollback: {
    title: (e) => `Roll ${e.name} back`, ok: "Roll back", danger: true,
    text: (e) => `Everything written to ${e.name} after the checkpoint is lost: at least ${own(e)}. Later checkpoints stay.${clients(e)}`,
    fields: (e, all) => [{ name: "checkpoint", label: "Checkpoint", options: checkpointsOf(e, all).map((c) => c.name) }],
    possible: (e, all) => checkpointsOf(e, all).length > 0,
    do: (e, f) => send("POST", `/v1/nodes/${path(e.name)}/rollback`, { checkpoint: f.checkpoint, force: e.connections > 0 }),
  },
  squash: {
    title: (e) => `Squash ${e.name}`, ok: "Squash",
    text: (e) => `The layers that only ${e.name} uses are copied into one. Nothing that it shows is lost; its clients continue.`,
    do: (e) => send("POST", `/v1/nodes/${path(e.name)}/squash`, {}),
  },
  merge: {
    title: (e) => `Merge ${e.name} into ${e.disk}`, ok: "Merge", danger: true,
    text: (e) => `The disk ${e.disk} is overwritten with what ${e.name} shows: what it holds there now is lost, except for what other nodes and checkpoints show, which is preserved first.`,
    do: (e) => send("POST", `/v1/nodes/${path(e.name)}/merge`, {}),
  },
  takeback: {
    title: (e) => `Take the merge of ${e.name} back`, ok: "Take merge back", danger: true,
    text: (e) => `The disk ${e.disk} gets what it had before the merge. What ${e.name} and other nodes show stays.`,
    possible: (e) => e.merge?.state === "failed",
    do: (e) => send("DELETE", `/v1/nodes/${path(e.name)}/merge`),
  },
  drop: {
    title: (e) => `Drop ${e.name}`, ok: "Drop", danger: true,
    text: (e) => `${e.name} and its file are deleted: ${own(e)} of its own are lost.${clients(e)}`,
    do: (e) => send("DELETE", `/v1/${e.kind === "node" ? "nodes" : "checkpoints"}/${path(e.name)}`),
  },
};

const origin = {
  snapshot: {
    title: (e) => `Snapshot of ${e.name}`, ok: "Make snapshot",
    text: (e) => `A snapshot of what ${e.name} shows now, in a new COW file of the server's host.`,
    fields: () => [{ name: "name", label: "Name" }, { name: "cow", label: "Path of the COW file" }],
    do: (e, f) => send("POST", "/v1/snapshots", { name: f.name, cow: f.cow, create: true }),
  },
  merge: {
    title: (e) => `Merge ${e.name} into ${e.disk}`, ok: "Merge", danger: true,
    text: (e) => `The origin is overwritten with what ${e.name} shows: ${own(e)}. What the origin holds there now is lost, except for what other served snapshots show. The snapshot's own store is empty afterwards; its clients continue on the origin.`,
    possible: (e) => !e.merge,
    do: (e) => send("POST", "/v1/merge", { name: e.name }),
  },
  drop: {
    title: (e) => `Stop serving ${e.name}`, ok: "Stop serving", label: "Drop", danger: true,
    text: (e) => `${e.name} is not served any more, and origin writes are not preserved for it from then on: that loses the snapshot as soon as the origin changes. Its file ${e.file} stays.${clients(e)}`,
    do: (e) => send("DELETE", `/v1/snapshots/${path(e.name)}`),
  },
};

// actionsOf returns the actions for an element.
export function actionsOf(e, server, all) {
  const [set, names] = server === "fleet"
    ? [fleet, { disk: ["fork"], checkpoint: ["fork", "drop"], node: ["fork", "checkpoint", "rollback", "squash", "merge", "takeback", "drop"] }[e.kind]]
    : [origin, { disk: ["snapshot"], node: ["merge", "drop"] }[e.kind]];
  return (names || []).filter((n) => !set[n].possible || set[n].possible(e, all)).map((n) => ({ id: n, label: set[n].label || set[n].ok, ...set[n] }));
}

// mergeActionsOf are those of a merge that has begun.
export function mergeActionsOf(e, server) {
  if (!e.merge) return [];
  const merge = server === "fleet" ? `/v1/nodes/${path(e.merge.node)}/merge` : "/v1/merge";
  switch (e.merge.state) {
    case "running": return [{ id: "pause", label: "Pause", do: () => send("POST", `${merge}/pause`) }];
    case "paused": case "failed": return [{ id: "resume", label: "Resume", do: () => send("POST", `${merge}/resume`) }];
  }
  return [];
}

export async function heatMap(name, parts) {
  return send("GET", `/v1/heat/${path(name)}?parts=${parts}`);
}

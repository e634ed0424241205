// Numbers for people.

const units = ["KiB", "MiB", "GiB", "TiB", "PiB"];

export function bytes(n) {
  if (n < 1024) return `${Math.round(n)} B`;
  let f = n / 1024, i = 0;
  while (f >= 1024 && i < units.length - 1) { f /= 1024; i++; }
  return `${f >= 100 || f === Math.trunc(f) ? f.toFixed(0) : f.toFixed(1)} ${units[i]}`;
}

export function rate(n) { return n < 1 ? "" : `${bytes(n)}/s`; }

export function duration(s) {
  if (s === undefined || s === null) return "";
  if (s < 100) return `${Math.round(s)} s`;
  if (s < 6000) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${(s / 3600).toFixed(1)} h`;
  return `${Math.round(s / 86400)} days`;
}

export function plural(n, one, many = one + "s") { return `${n} ${n === 1 ? one : many}`; }

// Requests to the service. What it refuses is thrown as its one line.

let csrf = null;

export async function ask(path, { method = "GET", body, type } = {}) {
  const headers = {};
  if (csrf !== null) headers["X-CSRF-Token"] = csrf;
  if (type !== undefined) headers["Content-Type"] = type;
  const answer = await fetch(path, { method, headers, body });
  if (answer.status === 204) return null;
  const told = await answer.json();
  if (!answer.ok) {
    const error = new Error(told.error);
    error.status = answer.status;
    throw error;
  }
  return told;
}

export function send(path, value) {
  return ask(path, { method: "POST", body: JSON.stringify(value), type: "application/json" });
}

export async function session() {
  const told = await ask("/v1/session");
  csrf = told.csrf;
  return told;
}

export async function logIn(token) {
  const told = await send("/v1/session", { token });
  csrf = told.csrf;
  return told;
}

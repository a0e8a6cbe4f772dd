// The functions of the host that the code of a run may call, as globals of that run: each returns a promise.
//
// Calls go to one pipe and answers come from another, a line each: "NUMBER NAME [[ARGUMENT, ...], {}]", and "NUMBER r RESULT" or
// "NUMBER e MESSAGE", all but the first two in JSON. What is read and written here never blocks: code that makes many calls waits
// for none but its own promises.
//
// Returns what makes the functions of a run, and returns what ends that.
(function makeFunctions(require, hidden, isLexical) {
  'use strict';
  const { Buffer, Error, JSON, Map, Number, Object, Promise, RangeError, TypeError, globalThis: global } = globalThis;
  const { openSync, constants } = require('node:fs');
  const { Socket } = require('node:net');
  const vm = require('node:vm');
  const { parse, stringify } = JSON;
  const { O_NONBLOCK, O_RDONLY, O_WRONLY } = constants;
  // As `constants.MAXIMUM_CALL_BYTES` on the host has it.
  const LIMIT = 2 ** 20;

  class HostFunctionError extends Error {
    get name() {
      return 'HostFunctionError';
    }
  }

  function check(key, value) {
    if (typeof value === 'function' || typeof value === 'symbol' || (typeof value === 'number' && !Number.isFinite(value))) {
      throw new TypeError(`the arguments of a function of the host's must be JSON, which ${String(value)} is not`);
    }
    return value;
  }

  // ASCII only, for a length in characters to be one in bytes.
  const encode = (value) => stringify(value, check).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`);

  // Give a global of the run a value; return what gives back the one before, if the code has not set another.
  function define(name, value) {
    if (isLexical(name)) return defineLexical(name, value);
    const before = Object.getOwnPropertyDescriptor(global, name);
    if (before?.configurable === false) global[name] = value;
    else Object.defineProperty(global, name, { value, configurable: true, writable: true });
    return () => {
      const now = Object.getOwnPropertyDescriptor(global, name);
      if (now === undefined || now.value !== value) return;
      if (before === undefined) delete global[name];
      else if (before.configurable) Object.defineProperty(global, name, before);
      else global[name] = before.value;
    };
  }

  // Of names that an earlier run declared by `let`, `const` or `class`, no property of the global object is seen.
  function defineLexical(name, value) {
    const read = () => vm.runInThisContext(name);
    const write = (written) => {
      global[hidden].functions.set(name, written);
      vm.runInThisContext(`${name} = ${hidden}.functions.get("${name}")`);
      global[hidden].functions.clear();
    };
    let before;
    try {
      before = read();
      write(value);
    } catch {
      return () => {}; // the declaration failed: nobody can use that name
    }
    return () => {
      if (read() === value) write(before);
    };
  }

  return function install({ names, answers, calls }) {
    const input = new Socket({ fd: openSync(answers, O_RDONLY | O_NONBLOCK), readable: true, writable: false });
    const output = new Socket({ fd: openSync(calls, O_WRONLY | O_NONBLOCK), readable: false, writable: true });
    const waiting = new Map();
    let isOver = false;
    let number = 0;
    let unfinished = [];

    const refusal = (name) => new Error(`${name}() of the host can't be called any more: the run that it was for is over`);

    function end() {
      isOver = true;
      input.destroy();
      output.destroy();
      for (const { name, reject } of waiting.values()) reject(refusal(name));
      waiting.clear();
    }

    function take(line) {
      const [, id, kind, text] = /^(\d+) ([re]) (.*)$/.exec(line);
      const call = waiting.get(Number(id));
      if (call === undefined) return;
      waiting.delete(Number(id));
      if (kind === 'r') {
        call.resolve(parse(text));
        return;
      }
      call.error.message = parse(text);
      call.reject(call.error);
    }

    input.on('data', (data) => {
      for (let start = 0; ; ) {
        const found = data.indexOf(10, start);
        if (found < 0) {
          if (start < data.length) unfinished.push(data.subarray(start));
          return;
        }
        const line = Buffer.concat([...unfinished, data.subarray(start, found)]).toString();
        unfinished = [];
        start = found + 1;
        take(line);
      }
    });
    for (const socket of [input, output]) {
      socket.on('error', end);
      socket.on('close', end);
    }

    function send(name, values, resolve, reject, error) {
      if (isOver) throw refusal(name);
      const text = encode([values, {}]);
      if (text.length > LIMIT) throw new RangeError(`the arguments of ${name}() may have ${LIMIT} bytes as JSON, not ${text.length}`);
      number += 1;
      waiting.set(number, { name, resolve, reject, error });
      output.write(`${number} ${name} ${text}\n`);
    }

    function make(name) {
      const wanted = (...values) =>
        new Promise((resolve, reject) => {
          // Errors show who called, and nothing of ours.
          const error = new HostFunctionError();
          Error.captureStackTrace(error, wanted);
          try {
            send(name, values, resolve, reject, error);
          } catch (thrown) {
            Error.captureStackTrace(thrown, wanted);
            throw thrown;
          }
        });
      Object.defineProperty(wanted, 'name', { value: name });
      return wanted;
    }

    const restore = names.map((name) => define(name, make(name)));
    return () => {
      end();
      for (const giveBack of restore) giveBack();
    };
  };
});

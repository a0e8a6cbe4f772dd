// The program that Node.js in an image runs to take code, by way of its porter (see porter.py). Node 18.19, 20.8 or later.
//
// It runs in the process of code that nobody trusts, and guards itself against accidents only: what it uses it has
// taken at the start. Each run has pipes of its own on descriptors 0 to 2; in between these are /dev/null.
//
// Code is evaluated as in a browser's console: names persist and can be declared again, `await` works at the top, and
// the last statement's value is known. What is left when a run ends (timers, servers) goes on, and prints to the run that is then current.
(function worker(require, answers, scratch, gate) {
  'use strict';
  const { Atomics, Buffer, Int32Array, Math, Object, SharedArrayBuffer, process } = globalThis;
  const fs = require('node:fs');
  const { createRequire } = require('node:module');
  const { Socket } = require('node:net');
  const { Writable } = require('node:stream');
  const { inspect, types } = require('node:util');
  const crypto = require('node:crypto');
  const vm = require('node:vm');
  const { Session } = require('node:inspector');
  const { closeSync, fstatSync, openSync, readSync, writeSync, ReadStream } = fs;
  const { O_APPEND, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY } = fs.constants;
  const { chdir, cwd, dlopen, exit, kill } = process;
  const { parse: parseJson } = JSON;
  const later = setImmediate;
  const CONTROL = 3;
  const VALUE_LIMIT = 65536;
  const SIGINT_STATUS = 130;
  const EX_SOFTWARE = 70;
  // As in `languages.py`.
  const WARM_UP = 2 ** 31;

  let acorn = null;
  try {
    acorn = require('internal/deps/acorn/acorn/dist/acorn');
  } catch {
    // Code with imports then fails as it would in Node's own console.
  }

  // What started us is nobody's argument.
  process.argv.length = 1;
  process.execArgv = [];

  function pause(milliseconds) {
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, milliseconds);
  }

  function writeAll(descriptor, data) {
    for (let position = 0; position < data.length; ) {
      try {
        position += writeSync(descriptor, data, position);
      } catch (error) {
        // A child of the code may have made the pipe one that does not block.
        if (error.code !== 'EAGAIN') return;
        pause(1);
      }
    }
  }

  function answer(text) {
    const descriptor = openSync(answers, O_WRONLY | O_APPEND);
    writeSync(descriptor, `${text}\n`);
    closeSync(descriptor);
  }

  // While Node puts back its own handler of SIGINT, which a script that can be broken off has replaced, a SIGINT is its end.
  function closeGate() {
    const descriptor = openSync(gate, O_RDWR);
    const sending = Buffer.alloc(1);
    writeSync(descriptor, Buffer.of(1), 0, 1, 0);
    while (readSync(descriptor, sending, 0, 1, 1) === 1 && sending[0] !== 0) pause(1);
    closeSync(descriptor);
  }

  function openGate() {
    const descriptor = openSync(gate, O_WRONLY);
    writeSync(descriptor, Buffer.of(0), 0, 1, 0);
    closeSync(descriptor);
  }

  // --- Descriptors 0 to 2 ---

  // Node has no dup2: the lowest number that is free is the next that is given out. If a thread of the code's
  // takes it first, it has to give it back before we go on.
  function place(path, number) {
    try {
      closeSync(number);
    } catch {
      // the code has
    }
    for (let tries = 0; tries < 2000; tries++) {
      const descriptor = openSync(path, number === 0 ? O_RDONLY : O_WRONLY);
      if (descriptor === number) return;
      closeSync(descriptor);
      pause(1);
    }
    exit(EX_SOFTWARE);
  }

  // Written to at once, and past all of the stream's own state: an interrupt at any point must not leave it stuck.
  function makeOutput(descriptor) {
    const stream = new Writable();
    stream.write = function write(chunk, encoding, done) {
      writeAll(descriptor, typeof chunk === 'string' ? Buffer.from(chunk, typeof encoding === 'string' ? encoding : 'utf8') : chunk);
      const callback = typeof encoding === 'function' ? encoding : done;
      if (typeof callback === 'function') process.nextTick(callback);
      return true;
    };
    // Like Node's own, it can't be closed.
    stream.end = function end(chunk, encoding, done) {
      if (typeof chunk === 'function') process.nextTick(chunk);
      else if (chunk != null) stream.write(chunk, encoding, done);
      return stream;
    };
    stream.destroy = () => stream;
    stream.fd = descriptor;
    stream._type = 'pipe';
    stream._isStdio = true;
    return stream;
  }

  let input = null;
  function closeInput() {
    if (input !== null) input.destroy();
    input = null;
  }
  const stdout = makeOutput(1);
  const stderr = makeOutput(2);
  for (const [name, get] of [
    ['stdin', () => (input ??= new ReadStream(null, { fd: 0, autoClose: false }))],
    ['stdout', () => stdout],
    ['stderr', () => stderr],
  ]) {
    Object.defineProperty(process, name, { configurable: true, enumerable: true, get });
  }

  // --- Randomness, which two machines that were made from one state must not share ---

  // V8's generator is seeded once. The kernel's is each machine's own.
  let pool = Buffer.alloc(0);
  let used = 0;
  function entropy(size) {
    const bytes = Buffer.alloc(size);
    const descriptor = openSync('/dev/urandom', O_RDONLY);
    for (let position = 0; position < size; ) position += readSync(descriptor, bytes, position, size - position, null);
    closeSync(descriptor);
    return bytes;
  }
  Math.random = function random() {
    if (used + 8 > pool.length) {
      pool = entropy(4096);
      used = 0;
    }
    const high = pool.readUInt32LE(used) >>> 5;
    const low = pool.readUInt32LE(used + 4) >>> 6;
    used += 8;
    return (high * 67108864 + low) / 9007199254740992;
  };

  // A library for x86-64 (System V ABI, ELF) that jumps to OpenSSL's RAND_poll when it is loaded, and does nothing else.
  function makeLibrary() {
    const [CODE, SYMBOLS, STRINGS, RELOCATION, SLOT, DYNAMIC, END] = [0xe8, 0xf0, 0x120, 0x130, 0x148, 0x150, 0x1e0];
    const file = Buffer.alloc(END);
    const words = (at, ...values) => values.forEach((value, i) => file.writeUInt32LE(value, at + 4 * i));
    const longs = (at, ...values) => values.forEach((value, i) => file.writeBigUInt64LE(BigInt(value), at + 8 * i));
    file.write('7f454c46020101', 'hex');
    words(16, 3 | (62 << 16), 1); // ET_DYN, EM_X86_64
    longs(24, 0, 64);
    words(52, 64 | (56 << 16), 3 | (64 << 16));
    words(64, 1, 7); // PT_LOAD: all of it
    longs(72, 0, 0, 0, END, END, 4096);
    words(120, 2, 6); // PT_DYNAMIC
    longs(128, DYNAMIC, DYNAMIC, DYNAMIC, END - DYNAMIC, END - DYNAMIC, 8);
    words(176, 0x6474e551, 6); // PT_GNU_STACK: not executable
    file.write('ff25', CODE, 'hex'); // jmp *SLOT(%rip)
    words(CODE + 2, SLOT - CODE - 6);
    words(SYMBOLS + 24, 1, 0x12); // a global function, undefined
    file.write('RAND_poll', STRINGS + 1);
    longs(RELOCATION, SLOT, 0x100000006, 0); // R_X86_64_GLOB_DAT of symbol 1
    // DT_INIT, STRTAB, STRSZ, SYMTAB, SYMENT, RELA, RELASZ, RELAENT
    longs(DYNAMIC, 12, CODE, 5, STRINGS, 10, 11, 6, SYMBOLS, 11, 24, 7, RELOCATION, 8, 24, 9, 24);
    return file;
  }

  // OpenSSL takes new entropy when it sees that it was forked, and does not see this; Node has no way to tell it.
  // RAND_poll reseeds the generator that those of all threads are reseeded from, before they are drawn from again.
  function renew() {
    used = pool.length;
    const descriptor = openSync(scratch, O_WRONLY | O_TRUNC);
    writeSync(descriptor, library);
    closeSync(descriptor);
    try {
      dlopen({ exports: {} }, scratch);
    } catch (error) {
      // It is no addon: Node says so, and unloads it. Anything else, and two machines may draw the same keys.
      if (!error.message.includes('did not self-register')) exit(EX_SOFTWARE);
    }
    // So many may be left, at most.
    if (stocked) {
      for (let i = 0; i < 128; i++) randomUUID();
      for (let i = 0; i < 1024; i++) randomInt(2);
    }
  }
  const library = makeLibrary();

  // These draw for later calls as well. To draw it all again takes a while.
  let stocked = false;
  const { randomInt, randomUUID, webcrypto } = crypto;
  for (const [owner, name] of [[crypto, 'randomInt'], [crypto, 'randomUUID'], [Object.getPrototypeOf(webcrypto), 'randomUUID']]) {
    const draw = owner[name];
    owner[name] = function (...rest) {
      stocked = true;
      return draw.apply(this, rest);
    };
  }
  require('node:module').syncBuiltinESMExports();

  // --- Evaluating ---

  const session = new Session();
  session.connect();
  const post = session.post.bind(session);

  let taken;
  let go = null;
  const { emitWarning } = process;
  process.emitWarning = () => {}; // that a constant below is new, which the first import says
  const importer = new vm.Script('(specifier, options) => import(specifier, options)', {
    filename: '[run]',
    importModuleDynamically: vm.constants?.USE_MAIN_CONTEXT_DEFAULT_LOADER,
  }).runInThisContext();
  importer('node:os').catch(() => {});
  process.emitWarning = emitWarning;
  const HIDDEN = '__trio_sandbox__';
  Object.defineProperty(globalThis, HIDDEN, {
    value: Object.freeze({ import: importer, take: (value) => (taken = value), go: () => go?.() }),
  });
  // SIGINT ends what this script does, at any point.
  const guard = new vm.Script(`${HIDDEN}.go()`, { filename: 'trio-sandbox worker' });
  let takeId;
  post('Runtime.evaluate', { expression: `${HIDDEN}.take`, objectGroup: 'worker' }, (error, { result }) => {
    takeId = result.objectId;
  });

  function fetchValue(remote) {
    if (remote.objectId === undefined) {
      return 'unserializableValue' in remote ? vm.runInThisContext(`(${remote.unserializableValue})`) : remote.value;
    }
    post('Runtime.callFunctionOn', {
      functionDeclaration: 'function (value) { this(value) }',
      objectId: takeId,
      arguments: [{ objectId: remote.objectId }],
    });
    const value = taken;
    taken = undefined;
    return value;
  }

  const PARSING = { ecmaVersion: 'latest', sourceType: 'script', allowImportExportEverywhere: true, allowAwaitOutsideFunction: true, allowHashBang: true };
  const declared = new Set(); // by let, const, class or import, which a var or function can't declare again

  function isFixed(name) {
    return Object.getOwnPropertyDescriptor(globalThis, name)?.configurable === false;
  }

  function bound(pattern, names = []) {
    switch (pattern?.type) {
      case 'Identifier':
        names.push(pattern.name);
        break;
      case 'ObjectPattern':
        for (const property of pattern.properties) bound(property.value ?? property.argument, names);
        break;
      case 'ArrayPattern':
        for (const element of pattern.elements) bound(element, names);
        break;
      case 'AssignmentPattern':
        bound(pattern.left, names);
        break;
      case 'RestElement':
        bound(pattern.argument, names);
        break;
    }
    return names;
  }

  function importText(node, code) {
    const options = node.attributes?.length
      ? `, { with: { ${node.attributes.map(({ key, value }) => `${key.raw ?? key.name}: ${value.raw}`).join(', ')} } }`
      : '';
    let text = `await ${HIDDEN}.import(${node.source.raw}${options})`;
    const named = [];
    let namespace = null;
    for (const { type, local, imported } of node.specifiers) {
      declared.add(local.name);
      if (type === 'ImportNamespaceSpecifier') namespace = local.name;
      else named.push(`${type === 'ImportDefaultSpecifier' ? 'default' : imported.raw ?? imported.name}: ${local.name}`);
    }
    if (namespace !== null) text = `const ${namespace} = ${text}`;
    if (named.length) text = namespace === null ? `const { ${named.join(', ')} } = ${text}` : `${text}, { ${named.join(', ')} } = ${namespace}`;
    return `${text};${'\n'.repeat(code.slice(node.start, node.end).split('\n').length - 1)}`;
  }

  // Source text that a console takes: imports become calls, and what can't be declared again is.
  function prepare(code) {
    if (acorn === null) return code;
    let tree;
    try {
      tree = acorn.parse(code, PARSING);
    } catch {
      return code; // V8 says what is wrong with it, or knows better
    }
    const edits = [];
    const edit = (start, end, text) => edits.push([start, end, text]);
    for (const node of tree.body) {
      if (node.type === 'ImportDeclaration') {
        edit(node.start, node.end, importText(node, code));
      } else if (node.type === 'VariableDeclaration') {
        const names = node.declarations.flatMap(({ id }) => bound(id));
        if (node.kind === 'var') {
          if (names.some((name) => declared.has(name))) {
            edit(node.start, node.start + 3, 'let');
            for (const name of names) declared.add(name);
          }
        } else if (names.some(isFixed)) {
          edit(node.start, node.declarations[0].start, ';');
          for (const { start, end, init } of node.declarations) {
            edit(start, start, '(');
            edit(end, end, init === null ? ' = undefined)' : ')');
          }
        } else {
          for (const name of names) declared.add(name);
        }
      } else if (node.type === 'FunctionDeclaration' && declared.has(node.id.name)) {
        edit(node.start, node.start, `let ${node.id.name} = `);
        edit(node.end, node.end, ';');
      } else if (node.type === 'ClassDeclaration') {
        if (isFixed(node.id.name)) {
          edit(node.start, node.start, `${node.id.name} = `);
          edit(node.end, node.end, ';');
        } else {
          declared.add(node.id.name);
        }
      }
    }
    if (code.includes('import')) {
      const nodes = [...tree.body];
      while (nodes.length) {
        const node = nodes.pop();
        if (node.type === 'ImportExpression') edit(node.start, node.start + 6, `${HIDDEN}.import`);
        for (const key in node) {
          const value = node[key];
          if (Array.isArray(value)) nodes.push(...value.filter((child) => typeof child?.type === 'string'));
          else if (typeof value?.type === 'string') nodes.push(value);
        }
      }
    }
    edits.sort((one, other) => other[0] - one[0] || other[1] - one[1]);
    for (const [start, end, text] of edits) code = code.slice(0, start) + text + code.slice(end);
    return code;
  }

  // What a line of TypeScript has that one of JavaScript has not, which is known to be wrong.
  const TYPESCRIPT = new RegExp(
    [
      /^\s*(?:export\s+)?(?:declare|abstract|enum|const\s+enum|interface|namespace|module|type)\s+[\w$]/,
      /\b(?:let|const|var)\s+[\w$]+!?\s*:/, // variables
      /\([^(){}]*[\w$]\??\s*:/, // parameters
      /\)\s*:\s*[\w$]/, // results
      /^\s*(?:(?:static|declare|override)\s+)*[\w$]+[?!]?\s*:\s*[\w$<>[\]| ]+(?:[;=]|$)/, // fields
      /\b(?:as|satisfies|implements)\s+[\w${]/,
      /\b(?:import|export)\s+type\b/,
      /\b(?:public|private|protected|readonly)\s+[\w$]/,
    ]
      .map(({ source }) => source)
      .join('|'),
  );

  // What Node prints of an error that nobody caught.
  function describe(error, details, code, name) {
    let text;
    try {
      text = types.isNativeError(error) ? inspect(error) : `Uncaught ${inspect(error)}`;
    } catch {
      text = 'Uncaught exception';
    }
    // From here on it is us who called.
    text = text.replace(/\n +at process\.processTicksAndRejections \(node:internal[^\n]*$/, '');
    text = text.replace(/\n +at (?:async )?Session\.post \(node:inspector[^\n]*(?:\n +at [^\n]*)*/g, '');
    if (details && types.isNativeError(error) && error.name === 'SyntaxError' && !/\n +at /.test(text)) {
      const line = code.split('\n')[details.lineNumber];
      if (line !== undefined) {
        text = `${name}:${details.lineNumber + 1}\n${line}\n${' '.repeat(details.columnNumber)}^\n\n${text}`;
        if (TYPESCRIPT.test(line)) {
          text += `\nIf this is TypeScript: Node.js ${process.versions.node} can't strip types. Compile it first (tsc, esbuild), and run the JavaScript.`;
        }
      }
    }
    return text;
  }

  function describeValue(value) {
    if (value === undefined) return '';
    try {
      const bytes = Buffer.from(inspect(value));
      if (bytes.length <= VALUE_LIMIT) return bytes.toString('hex');
      const note = Buffer.from(`... (${bytes.length} bytes)`);
      return Buffer.concat([bytes.subarray(0, VALUE_LIMIT - note.length), note]).toString('hex');
    } catch {
      return '';
    }
  }

  // --- Runs ---

  let current = null;
  let required = null;
  const control = fstatSync(CONTROL).ino;

  function isControlOurs() {
    try {
      return fstatSync(CONTROL).ino === control;
    } catch {
      return false;
    }
  }

  function finish(run, status, value) {
    if (run !== current || run.over) return;
    run.over = true;
    conclude(run, status, value);
  }

  function conclude(run, status, value) {
    // What the run left to be done at once belongs to it, an unhandled rejection above all.
    later(() =>
      later(() => {
        if (run !== current) return;
        if (status === 0 && run.failed) status = 1;
        if (process.exitCode !== undefined) status = process.exitCode & 0xff;
        process.exitCode = undefined;
        const text = status === 0 ? describeValue(value) : '';
        if (!isControlOurs()) exit(status); // the code closed it: our exit status is the run's
        current = null;
        closeInput();
        for (const number of [0, 1, 2]) place('/dev/null', number);
        answer(`D ${run.token} ${status} ${text}`.trimEnd());
      }),
    );
  }

  function fail(error, details) {
    writeAll(2, Buffer.from(`${describe(error, details, current?.code ?? '', current?.name)}\n`));
    if (current === null) return;
    current.failed = true;
    finish(current, 1);
  }

  function interrupt(run) {
    if (run.over) return conclude(run, SIGINT_STATUS); // it may have been us who were stopped
    writeAll(2, Buffer.from('Interrupted\n'));
    finish(run, SIGINT_STATUS);
  }

  function settle(run, { result, exceptionDetails }) {
    if (exceptionDetails) {
      fail(fetchValue(exceptionDetails.exception ?? result), exceptionDetails);
      return;
    }
    const value = fetchValue(result);
    if (types.isPromise(value)) {
      value.then(
        (settled) => finish(run, 0, settled),
        (error) => run === current && !run.over && fail(error),
      );
    } else {
      finish(run, 0, value);
    }
  }

  function begin(request) {
    const { run: token, number, env, cwd: directory, files } = request;
    try {
      if (directory !== null) chdir(directory);
    } catch (error) {
      answer(`F ${token} ${-error.errno}`);
      return;
    }
    for (const [name, value] of env) process.env[name] = value;
    files.slice(0, 3).forEach(place);
    const name = number < WARM_UP ? `<run-${number}>` : `<warm-up-${number - WARM_UP}>`;
    const run = (current = { token, name, code: request.code, over: false, failed: false });
    const here = `${cwd()}/`;
    if (required?.here !== here && (required === null || globalThis.require === required.require)) {
      required = { here, require: createRequire(here) };
      Object.defineProperty(globalThis, 'require', { value: required.require, configurable: true, writable: true });
    }
    const expression = `${prepare(request.code)}\n//# sourceURL=${name}`;
    go = () => {
      go = null;
      answer(`B ${token}`);
      const settings = { expression, replMode: true, silent: true, objectGroup: 'run' };
      post('Runtime.evaluate', settings, (error, result) => {
        if (run !== current) return;
        settle(run, error ? { exceptionDetails: { exception: { value: error.message } } } : result);
        post('Runtime.releaseObjectGroup', { objectGroup: 'run' });
      });
      closeGate();
    };
    let error = null;
    try {
      guard.runInThisContext({ breakOnSigint: true, displayErrors: false });
    } catch (thrown) {
      error = thrown;
    }
    openGate();
    if (error?.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED') interrupt(run);
    else if (error !== null) fail(error);
  }

  process.on('SIGINT', () => {
    // As for any process, a handler of the code's own decides.
    if (current !== null && !current.over && process.listenerCount('SIGINT') === 1) interrupt(current);
  });
  process.on('uncaughtException', (error) => fail(error));
  process.on('unhandledRejection', (error) => fail(error));

  function obey(line) {
    const request = parseJson(line);
    if (request.run !== undefined) begin(request);
    else if (request.renew) renew();
    // Signals are told of at the end of a turn of the event loop.
    else later(() => later(() => forgetSignals(request.ask)));
  }

  // Node's watchdog may have a SIGINT left over from the script before: it would end the next one.
  function forgetSignals(token) {
    for (let left = true; left; ) {
      left = false;
      go = () => {
        go = null;
        pause(10);
      };
      try {
        guard.runInThisContext({ breakOnSigint: true, displayErrors: false });
      } catch {
        left = true;
      }
    }
    answer(`S ${token}`);
  }

  const socket = new Socket({ fd: CONTROL, readable: true, writable: false });
  let unfinished = [];
  socket.on('data', (data) => {
    for (let start = 0; ; ) {
      const end = data.indexOf(10, start);
      if (end < 0) {
        if (start < data.length) unfinished.push(data.subarray(start));
        return;
      }
      const line = Buffer.concat([...unfinished, data.subarray(start, end)]).toString();
      unfinished = [];
      start = end + 1;
      obey(line);
    }
  });
  socket.on('close', () => {
    current = null; // our porter is gone, and nothing that is said of its run means anything
    kill(process.pid, 'SIGKILL');
  });
  for (const number of [0, 1, 2]) place('/dev/null', number);
  answer('R');
});

// The program that Node.js in an image runs to take code, by way of its porter (see porter.py). Node 18.19, 20.8 or later;
// for imports 20.12, 21.7 or later.
//
// It runs in the process of code that nobody trusts, and guards itself against accidents only: what it uses it has
// taken at the start. Each run has pipes of its own on descriptors 0 to 2; in between these are /dev/null.
//
// Code is evaluated as in a browser's console: names persist and can be declared again, `await` works at the top, and
// the last statement's value is known. What is left when a run ends (timers, servers) goes on, and prints to the run that is then current.
(function worker(require, answers, scratch, gate, makePreparer, makeRandomness, makeFunctions) {
  'use strict';
  const { ArrayBuffer, Atomics, Buffer, Int32Array, Object, SharedArrayBuffer, process } = globalThis;
  const fs = require('node:fs');
  const Module = require('node:module');
  const { createRequire } = Module;
  const { Socket } = require('node:net');
  const { Writable } = require('node:stream');
  const { inspect, types } = require('node:util');
  const vm = require('node:vm');
  const { Session } = require('node:inspector');
  const { closeSync, fstatSync, openSync, readSync, writeSync, ReadStream } = fs;
  const { O_APPEND, O_DIRECTORY, O_RDONLY, O_RDWR, O_WRONLY } = fs.constants;
  const O_PATH = 0o10000000;
  const { chdir, cwd, exit, kill, reallyExit } = process;
  const { parse: parseJson } = JSON;
  const { isView } = ArrayBuffer;
  const later = setImmediate;
  const CONTROL = 3;
  const VALUE_LIMIT = 65536;
  const SIGINT_STATUS = 130;
  const EX_SOFTWARE = 70;
  // As in `languages.py`.
  const WARM_UP = 2 ** 31;

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

  // Code may have changed what all objects inherit. Where that fails us, nothing else would ever tell the end of a run.
  const BROKEN = Buffer.from('trio-sandbox: the code has broken its interpreter; the next run has a new one\n');
  function guarded(act, complaint = BROKEN) {
    return (first, second) => {
      try {
        return act(first, second);
      } catch {
        writeAll(2, complaint);
        reallyExit(EX_SOFTWARE);
      }
    };
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
    // Who waits for it to end (`pipeline`) waits for "finish" only, as it never closes.
    const stream = new Writable({ autoDestroy: false, emitClose: false });
    const { write: refuse } = stream;
    stream.write = function write(chunk, encoding, done) {
      if (typeof chunk === 'string') writeAll(descriptor, Buffer.from(chunk, typeof encoding === 'string' ? encoding : 'utf8'));
      else if (isView(chunk)) writeAll(descriptor, Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength));
      else return refuse.call(stream, chunk); // which throws
      const callback = typeof encoding === 'function' ? encoding : done;
      if (typeof callback === 'function') process.nextTick(callback);
      return true;
    };
    // Like Node's own, it can't be closed.
    stream.end = function end(chunk, encoding, done) {
      const callback = typeof chunk === 'function' ? chunk : typeof encoding === 'function' ? encoding : done;
      if (typeof chunk !== 'function' && chunk != null) stream.write(chunk, typeof encoding === 'string' ? encoding : undefined);
      process.nextTick(() => {
        stream.emit('finish');
        if (typeof callback === 'function') callback();
      });
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
  function makeInput() {
    const stream = new ReadStream(null, { fd: 0, autoClose: false });
    stream.ref = stream.unref = () => stream; // as that of a pipe has
    return stream;
  }
  const stdout = makeOutput(1);
  const stderr = makeOutput(2);
  for (const [name, get] of [
    ['stdin', () => (input ??= makeInput())],
    ['stdout', () => stdout],
    ['stderr', () => stderr],
  ]) {
    Object.defineProperty(process, name, { configurable: true, enumerable: true, get });
  }

  // --- Evaluating ---

  const renew = makeRandomness(require, scratch, () => exit(EX_SOFTWARE));
  const session = new Session();
  session.connect();
  const post = session.post.bind(session);

  let taken;
  let go = null;
  const { emitWarning } = process;
  process.emitWarning = () => {}; // that a constant below is new, which the first import says; and that this is for tests
  const { setPrepareStackTraceCallback } = require('internal/test/binding').internalBinding('errors');
  const builtins = require('internal/modules/helpers').loadBuiltinModule('fs', 'fs').constructor.map;
  const importer = new vm.Script('(specifier, options) => import(specifier, options)', {
    filename: '[run]',
    importModuleDynamically: vm.constants?.USE_MAIN_CONTEXT_DEFAULT_LOADER,
  }).runInThisContext();
  importer('node:os').catch(() => {});
  process.emitWarning = emitWarning;
  const HIDDEN = '__trio_sandbox__';
  Object.defineProperty(globalThis, HIDDEN, {
    value: Object.freeze({
      import: importer,
      take: (value) => (taken = value),
      go: () => go?.(),
      functions: new Map(),
      get constant() {},
      set constant(value) {
        const error = new TypeError('Assignment to constant variable.');
        const { set } = Object.getOwnPropertyDescriptor(globalThis[HIDDEN], 'constant');
        Error.captureStackTrace(error, set);
        throw error;
      },
    }),
  });
  const { prepare, isLexical } = makePreparer(require('internal/deps/acorn/acorn/dist/acorn'), HIDDEN);
  const installFunctions = makeFunctions(require, HIDDEN, isLexical);
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

  // No stack goes on to what calls the code of runs. All else is Node's own way to write one.
  const { prepareStackTraceCallback, prepareStackTrace = prepareStackTraceCallback } = require('internal/errors');
  function isOurs(site) {
    return site === undefined || site.getFileName() === 'trio-sandbox worker';
  }
  setPrepareStackTraceCallback((realm, error, trace) => {
    const end = trace.findIndex((site, index) => site.getFileName() === 'node:inspector' && isOurs(trace[index + 1]));
    return prepareStackTrace(realm, error, end < 0 ? trace : trace.slice(0, end));
  });

  // What Node prints of an error that nobody caught.
  function describe(error, details, code, name) {
    let text;
    try {
      text = inspect(error);
      if (!types.isNativeError(error)) text = `Uncaught ${text}`;
      // As `inspect` writes one that has no frames: all were ours.
      else if (text.startsWith(`[${error.stack}]`)) text = `${error.stack}${text.slice(error.stack.length + 2)}`;
    } catch {
      text = 'Uncaught exception';
    }
    // From here on it is us who called.
    text = text.replace(/\n +at process\.processTicksAndRejections \(node:internal[^\n]*$/, '');
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
  // What code of runs finds as its module, which is the main one: `require.main === module`.
  const main = new Module('.');
  function give(name, value) {
    Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  }
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
    const tell = guarded(() => {
      if (run !== current) return;
      if (status === 0 && run.failed) status = 1;
      if (process.exitCode !== undefined) status = process.exitCode & 0xff;
      process.exitCode = undefined;
      const text = status === 0 ? describeValue(value) : '';
      if (!isControlOurs()) exit(status); // the code closed it: our exit status is the run's
      current = null;
      closeInput();
      run.endFunctions();
      run.restore();
      for (const number of [0, 1, 2]) place('/dev/null', number);
      answer(`D ${run.token} ${status} ${text}`.trimEnd());
    });
    later(() => later(tell));
  }

  const fail = guarded((error, details) => {
    writeAll(2, Buffer.from(`${describe(error, details, current?.code ?? '', current?.name)}\n`));
    if (current === null) return;
    current.failed = true;
    finish(current, 1);
  });

  // A script that is broken off runs no `finally`: what it was loading would be half a module for good. It is loaded again when it is wanted again.
  function forgetHalfModules() {
    for (const [name, module] of Object.entries(Module._cache)) {
      if (!module.loaded) delete Module._cache[name];
    }
    for (const module of builtins.values()) {
      if (!module.loading) continue;
      module.loading = false;
      module.exports = {};
    }
  }

  function interrupt(run) {
    if (run.over) return conclude(run, SIGINT_STATUS); // it may have been us who were stopped
    writeAll(2, Buffer.from('Interrupted\n'));
    finish(run, SIGINT_STATUS);
  }

  function settle(run, { result, exceptionDetails }) {
    if (exceptionDetails) return fail(fetchValue(exceptionDetails.exception ?? result), exceptionDetails);
    const value = fetchValue(result);
    if (!types.isPromise(value)) return finish(run, 0, value);
    value.then(
      (settled) => finish(run, 0, settled),
      (error) => run === current && !run.over && fail(error),
    );
  }

  // Have the variables and the directory that a run is to have; return what gives back those before.
  function setUp(variables, directory) {
    if (!variables.length && directory === null) return () => {};
    const before = directory === null ? null : openSync('.', O_PATH | O_DIRECTORY);
    try {
      if (directory !== null) chdir(directory);
    } catch (error) {
      closeSync(before);
      throw error;
    }
    const env = Object(process.env);
    const old = variables.map(([name]) => [name, env[name]]);
    for (const [name, value] of variables) env[name] = value;
    return () => {
      for (const [name, value] of old) {
        if (value === undefined) delete env[name];
        else env[name] = value;
      }
      if (before === null) return;
      try {
        chdir(`/proc/self/fd/${before}`);
        closeSync(before);
      } catch {
        // The code has closed it, or may not go there any more: it stays where it is.
      }
    };
  }

  function begin(request) {
    const { run: token, number, env, cwd: directory, files } = request;
    let restore;
    try {
      restore = setUp(env, directory);
    } catch (error) {
      answer(`F ${token} ${-error.errno}`);
      return;
    }
    files.slice(0, 3).forEach(place);
    const name = number < WARM_UP ? `<run-${number}>` : `<warm-up-${number - WARM_UP}>`;
    const run = (current = { token, name, code: request.code, restore, endFunctions: () => {}, over: false, failed: false });
    if (request.functions) run.endFunctions = installFunctions(request.functions);
    const here = `${cwd()}/`;
    if (required?.here !== here && (required === null || globalThis.require === required.require)) {
      if (required === null) {
        give('module', main);
        give('exports', main.exports);
      }
      required = { here, require: createRequire(here) };
      required.require.main = main;
      give('require', required.require);
    }
    const { code, prelude } = prepare(request.code);
    const evaluate = (text, done) => {
      const settings = { expression: `${text}\n//# sourceURL=${name}`, replMode: true, silent: true, objectGroup: 'run' };
      post('Runtime.evaluate', settings, done);
    };
    go = () => {
      go = null;
      answer(`B ${token}`);
      if (prelude) evaluate(prelude, () => {});
      const done = guarded((error, result) => {
        if (run !== current || (error && process._exiting)) return;
        settle(run, error ? { exceptionDetails: { exception: { value: error.message } } } : result);
        post('Runtime.releaseObjectGroup', { objectGroup: 'run' });
      });
      evaluate(code, done);
      closeGate();
    };
    let error = null;
    try {
      guard.runInThisContext({ breakOnSigint: true, displayErrors: false });
    } catch (thrown) {
      error = thrown;
    }
    openGate();
    if (error?.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED') {
      forgetHalfModules();
      interrupt(run);
    } else if (error !== null) fail(error);
  }

  process.on('SIGINT', () => {
    // As for any process, a handler of the code's own decides.
    if (current !== null && !current.over && process.listenerCount('SIGINT') === 1) interrupt(current);
  });
  // They are for the handlers that the code has, if it has any.
  const isHandled = (event) => process.listenerCount(event) > 1;
  process.on('uncaughtException', (error) => isHandled('uncaughtException') || fail(error));
  process.on('unhandledRejection', (error) => {
    if (isHandled('unhandledRejection')) return;
    if (isHandled('uncaughtException')) process.emit('uncaughtException', error, 'unhandledRejection');
    else fail(error);
  });

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
  // It complains of nothing: no code of the run has begun, and another interpreter can have it.
  const take = guarded((data) => {
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
  }, []);
  socket.on('data', take);
  socket.on('close', () => {
    current = null; // our porter is gone, and nothing that is said of its run means anything
    kill(process.pid, 'SIGKILL');
  });
  for (const number of [0, 1, 2]) place('/dev/null', number);
  answer('R');
});

// What two machines that were made from one state must not share: the generators of V8 and of OpenSSL.
//
// Returns what makes them start anew.
(function makeRandomness(require, scratch, giveUp) {
  'use strict';
  const { Buffer, Math, Object, process } = globalThis;
  const { closeSync, constants, openSync, readSync, writeSync } = require('node:fs');
  const crypto = require('node:crypto');
  const vm = require('node:vm');
  const { dlopen } = process;
  const { O_RDONLY, O_TRUNC, O_WRONLY } = constants;

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

  // A context has a Math of its own, seeded from what was there when we were: it gets ours.
  const { createContext, isContext, runInContext, Script } = vm;
  const { runInContext: runScript } = Script.prototype;
  const { random } = Math;
  vm.createContext = function (...rest) {
    const [object] = rest;
    const isOld = typeof object === 'object' && object !== null && isContext(object);
    const context = createContext(...rest);
    // One that brings a Math of its own has that.
    if (!isOld && !('Math' in context)) {
      runInContext('(draw) => { Math.random = function random() { return draw(); }; }', context)(random);
    }
    return context;
  };
  function contextFor(object, options) {
    const { contextName: name, contextOrigin: origin, contextCodeGeneration: codeGeneration, microtaskMode } = Object(options);
    return vm.createContext(object, { name, origin, codeGeneration, microtaskMode });
  }
  vm.runInNewContext = function (code, object, options) {
    return runInContext(code, contextFor(object, options), options);
  };
  Script.prototype.runInNewContext = function (object, options) {
    return runScript.call(this, contextFor(object, options), options);
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
      if (!error.message.includes('did not self-register')) giveUp();
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

  return renew;
});

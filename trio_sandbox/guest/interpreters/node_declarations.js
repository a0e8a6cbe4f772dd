// What the worker of Node.js does to the text of a run before V8 gets it, so that names can be declared again.
//
// V8 has two kinds of names that last. Those of `let`, `const`, `class` and imports can be declared again in a later text, but only
// by the same mode; those of `var` and `function` are properties of the global object, which can't be deleted, nor shadowed. Hence:
//
// - `const` and imports are declared by `let`, and what assigns to such a name is made to throw;
// - a declaration of a name that is such a property becomes an assignment;
// - where a name was declared by `let`, `var` becomes an assignment, and a function goes into a text of its own, the prelude,
//   which runs first: it is there from the beginning, as functions are.
//
// Names that one text declares twice are V8's to refuse: the text is left as it is. Lines stay where they are.
(function makePreparer(acorn, hidden) {
  'use strict';
  const { Object, Set, Map, globalThis: global } = globalThis;
  const PARSING = { ecmaVersion: 'latest', sourceType: 'script', allowImportExportEverywhere: true, allowAwaitOutsideFunction: true, allowHashBang: true };
  const FUNCTIONS = new Set(['FunctionDeclaration', 'FunctionExpression', 'ArrowFunctionExpression']);
  const lexical = new Set(); // names that V8 has from `let` or `class`
  const constants = new Set(); // names that are not to be assigned to

  function isProperty(name) {
    const property = Object.getOwnPropertyDescriptor(global, name);
    return property?.configurable === false && property.writable === true;
  }

  // Identifiers that a pattern declares or assigns to, each with whether it stands for a property of the same name, too.
  function targets(pattern, shorthand = false, found = []) {
    switch (pattern?.type) {
      case 'Identifier':
        found.push({ name: pattern.name, start: pattern.start, end: pattern.end, shorthand });
        break;
      case 'ObjectPattern':
        for (const property of pattern.properties) targets(property.value ?? property.argument, property.shorthand, found);
        break;
      case 'ArrayPattern':
        for (const element of pattern.elements) targets(element, false, found);
        break;
      case 'AssignmentPattern':
        targets(pattern.left, shorthand, found);
        break;
      case 'RestElement':
        targets(pattern.argument, false, found);
        break;
    }
    return found;
  }

  const namesOf = (pattern) => targets(pattern).map(({ name }) => name);
  const declaredBy = (node) => node.declarations.flatMap(({ id }) => namesOf(id));

  function* childrenOf(node) {
    for (const key in node) {
      const value = node[key];
      if (Array.isArray(value)) yield* value.filter((child) => typeof child?.type === 'string');
      else if (typeof value?.type === 'string') yield value;
    }
  }

  // What is in *root*, but not in a function of it: each node with its parent.
  function* withoutFunctions(root) {
    const left = [root];
    while (left.length) {
      const parent = left.pop();
      for (const node of childrenOf(parent)) {
        yield [node, parent];
        if (!FUNCTIONS.has(node.type) && node.type !== 'StaticBlock') left.push(node);
      }
    }
  }

  const isVar = ([node]) => node.type === 'VariableDeclaration' && node.kind === 'var';
  const namesOfVars = (root) => [...withoutFunctions(root)].filter(isVar).flatMap(([node]) => declaredBy(node));

  function lexicalIn(statements) {
    return statements.flatMap((node) => {
      if (node?.type === 'VariableDeclaration' && node.kind !== 'var') return declaredBy(node);
      return node?.type === 'ClassDeclaration' || node?.type === 'FunctionDeclaration' ? [node.id.name] : [];
    });
  }

  // Names that mean something else inside of *node* than outside.
  function scopeOf(node) {
    if (FUNCTIONS.has(node.type)) {
      const own = node.type === 'FunctionExpression' && node.id !== null ? [node.id.name] : [];
      return [...own, ...node.params.flatMap(namesOf), ...namesOfVars(node.body)];
    }
    switch (node.type) {
      case 'BlockStatement':
        return lexicalIn(node.body);
      case 'StaticBlock':
        return [...lexicalIn(node.body), ...namesOfVars(node)];
      case 'SwitchStatement':
        return lexicalIn(node.cases.flatMap(({ consequent }) => consequent));
      case 'ForStatement':
        return lexicalIn([node.init]);
      case 'ForInStatement':
      case 'ForOfStatement':
        return lexicalIn([node.left]);
      case 'CatchClause':
        return namesOf(node.param);
      case 'ClassDeclaration':
      case 'ClassExpression':
        return node.id === null ? [] : [node.id.name];
      default:
        return [];
    }
  }

  function assigned(node) {
    if (node.type === 'AssignmentExpression') return targets(node.left);
    if (node.type === 'UpdateExpression') return targets(node.argument);
    if (node.type === 'ForInStatement' || node.type === 'ForOfStatement') return targets(node.left);
    return [];
  }

  // Make what assigns to a constant throw, and have `import()` find what is ours to find.
  function guard(tree, edit) {
    const left = [[tree, null]];
    while (left.length) {
      const [node, outer] = left.pop();
      const names = node === tree ? [] : scopeOf(node);
      const scope = names.length ? { names: new Set(names), outer } : outer;
      const isConstant = (name) => {
        for (let inner = scope; inner !== null; inner = inner.outer) if (inner.names.has(name)) return false;
        return constants.has(name);
      };
      const wrong = assigned(node).filter(({ name }) => isConstant(name));
      if (wrong.length && /^(\|\||&&|\?\?)=$/.test(node.operator)) {
        // It may come to no assignment.
        edit(node.left.end, node.right.start, ` ${node.operator.slice(0, 2)} (${hidden}.constant = `);
        edit(node.end, node.end, ')');
      } else {
        for (const { name, start, end, shorthand } of wrong) edit(start, end, `${shorthand ? `${name}: ` : ''}${hidden}.constant`);
      }
      if (node.type === 'ImportExpression') edit(node.start, node.start + 6, `${hidden}.import`);
      for (const child of childrenOf(node)) left.push([child, scope]);
    }
  }

  const blank = (text) => text.replace(/[^\n\r\u2028\u2029]/g, ' ');

  function applyEdits(code, edits) {
    for (const [start, end, text] of edits.sort((one, other) => other[0] - one[0] || other[1] - one[1])) {
      code = code.slice(0, start) + text + code.slice(end);
    }
    return code;
  }

  class Preparation {
    edits = [];
    declarations = []; // of the prelude
    functions = new Map(); // those that go into the prelude, by their names
    moved = []; // what the text itself has no more
    imports = '';

    constructor(code, tree) {
      this.code = code;
      this.tree = tree;
    }

    edit = (start, end, text) => this.edits.push([start, end, text]);

    // Names that are declared in this text: by assignment, if one of them has to be.
    declare(names, byLet) {
      const mustAssign = names.some((name) => (byLet ? isProperty(name) : lexical.has(name)));
      for (const name of names) {
        const isLexical = lexical.has(name) || (byLet && !isProperty(name));
        if (mustAssign && !isProperty(name)) this.declarations.push(`${isLexical ? 'let' : 'var'} ${name};`);
        if (isLexical) lexical.add(name);
      }
      return mustAssign;
    }

    assign({ start, declarations }) {
      this.edit(start, declarations[0].start, 'void (');
      this.edit(declarations.at(-1).end, declarations.at(-1).end, ')');
    }

    addVar(node, parent) {
      const names = declaredBy(node);
      for (const name of names) constants.delete(name);
      if (!this.declare(names.filter((name) => !this.functions.has(name)), false) && !names.some((name) => this.functions.has(name))) return;
      if (parent.type.startsWith('For')) this.edit(node.start, node.declarations[0].start, '');
      else this.assign(node);
    }

    addLexical(node) {
      const names = declaredBy(node);
      for (const name of names) node.kind === 'const' ? constants.add(name) : constants.delete(name);
      if (this.declare(names, true)) {
        this.assign(node);
        for (const { end, init } of node.declarations) if (init === null) this.edit(end, end, ' = void 0');
      } else if (node.kind === 'const') {
        this.edit(node.start, node.start + 5, 'let  ');
      }
    }

    addClass({ id, start, end }) {
      constants.delete(id.name);
      if (!this.declare([id.name], true)) return;
      this.edit(start, start, `void (${id.name} = `);
      this.edit(end, end, ');');
    }

    addFunction(node) {
      constants.delete(node.id.name);
      if (!lexical.has(node.id.name)) return;
      this.moved.push(node);
      this.functions.set(node.id.name, node); // the last one counts
    }

    // V8 would declare it outside of its block as well, which the name does not allow.
    addBlockFunction({ id }, { start, end }) {
      if (!lexical.has(id.name)) return;
      this.edit(start + 1, start + 1, `let ${id.name}; {`);
      this.edit(end - 1, end - 1, '}');
    }

    addImport(node) {
      const options = node.attributes?.length
        ? `, { with: { ${node.attributes.map(({ key, value }) => `${key.raw ?? key.name}: ${value.raw}`).join(', ')} } }`
        : '';
      const module = `await ${hidden}.import(${node.source.raw}${options})`;
      const locals = node.specifiers.map(({ local }) => local.name);
      const byAssignment = this.declare(locals, true);
      const bind = (pattern, value) => (this.imports += byAssignment ? `void (${pattern} = ${value}); ` : `let ${pattern} = ${value}; `);
      const named = [];
      let namespace = null;
      for (const { type, local, imported } of node.specifiers) {
        constants.add(local.name);
        if (type === 'ImportNamespaceSpecifier') namespace = local.name;
        else named.push(`${type === 'ImportDefaultSpecifier' ? 'default' : imported.raw ?? imported.name}: ${local.name}`);
      }
      if (namespace !== null) bind(namespace, module);
      if (named.length) bind(`{ ${named.join(', ')} }`, namespace ?? module);
      if (!locals.length) this.imports += `${module}; `;
      this.edit(node.start, node.end, `;${blank(this.code.slice(node.start, node.end)).replace(/ /g, '')}`);
    }

    // The text with what was moved out of it blank, and its imports before all else but directives.
    main() {
      let { code } = this;
      for (const { start, end } of this.moved) code = code.slice(0, start) + blank(code.slice(start, end)) + code.slice(end);
      const first = this.tree.body.find(({ directive }) => directive === undefined)?.start ?? 0;
      code = applyEdits(code, this.edits.filter(([at]) => !this.isMoved(at)));
      return this.imports ? code.slice(0, first) + this.imports + code.slice(first) : code;
    }

    isMoved(at) {
      return this.moved.some(({ start, end }) => start <= at && at < end);
    }

    // Functions in it are where they are in the text.
    prelude() {
      if (!this.functions.size && !this.declarations.length) return '';
      const functions = [...this.functions.values()].sort((one, other) => one.start - other.start);
      const edits = [];
      let code = '';
      for (const { start, end, id } of functions) {
        code += blank(this.code.slice(code.length, start));
        const before = code.lastIndexOf('\n');
        // At the end of the line before, or columns would be others.
        const at = before >= 0 && code.slice(before).trim() === '' ? before : start;
        edits.push([at, at, `;let ${id.name} =`], [id.start, id.end, '']);
        edits.push(...this.edits.filter(([position]) => start <= position && position < end));
        code += this.code.slice(start, end);
      }
      return `${applyEdits(code, edits)};${this.declarations.join(' ')}`;
    }
  }

  // Return the text for V8, and what is to run before it, if anything.
  function prepare(code) {
    let tree;
    try {
      tree = acorn.parse(code, PARSING);
    } catch {
      return { code, prelude: '' }; // V8 says what is wrong with it, or knows better
    }
    const preparation = new Preparation(code, tree);
    for (const node of tree.body) if (node.type === 'FunctionDeclaration') preparation.addFunction(node);
    for (const [node, parent] of withoutFunctions(tree)) {
      if (isVar([node])) preparation.addVar(node, parent);
      else if (node.type === 'FunctionDeclaration' && parent.type === 'BlockStatement') preparation.addBlockFunction(node, parent);
    }
    for (const node of tree.body) {
      if (node.type === 'ImportDeclaration') preparation.addImport(node);
      else if (node.type === 'VariableDeclaration' && node.kind !== 'var') preparation.addLexical(node);
      else if (node.type === 'ClassDeclaration') preparation.addClass(node);
    }
    if (constants.size || code.includes('import')) guard(tree, preparation.edit);
    return { code: preparation.main(), prelude: preparation.prelude() };
  }

  return { prepare, isLexical: (name) => lexical.has(name) };
});

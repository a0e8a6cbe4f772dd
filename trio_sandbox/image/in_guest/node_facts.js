// Says what packages for the Node.js that runs it have to be: on a line of JSON, behind a mark. Its text is run by the Node.js of an image, in a
// virtual machine of that image. Argument: the mark.
const {header} = process.report.getReport();
const facts = {
    interpreter: process.execPath,
    version: process.versions.node,
    architecture: process.arch,
    libc: header.glibcVersionRuntime ? "glibc" : "musl",
};
process.stdout.write(`\n${process.argv[1]}${JSON.stringify(facts)}\n`);

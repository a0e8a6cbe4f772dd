// Puts packages into /: it needs no shell and no other program of the image. Its text is run by the Node.js of an image, as root, in a virtual machine of
// that image. Arguments: the directory with what is to be put there, and places that are cleared before.
const fs = require("node:fs");
const path = require("node:path");

function copy(source, target) {
    for (const entry of fs.readdirSync(source, {withFileTypes: true})) {
        const from = path.join(source, entry.name);
        const to = path.join(target, entry.name);
        if (entry.isDirectory()) {
            fs.mkdirSync(to, {recursive: true});
            copy(from, to);
            continue;
        }
        fs.rmSync(to, {force: true, recursive: true});
        if (entry.isSymbolicLink()) fs.symlinkSync(fs.readlinkSync(from), to);
        else fs.copyFileSync(from, to);
    }
}

const [content, ...cleared] = process.argv.slice(1);
process.umask(0o022);
for (const place of cleared) fs.rmSync(place, {force: true, recursive: true});
copy(content, "/");

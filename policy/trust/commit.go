package trust

import (
	"context"
	"io/fs"
	"time"
)

// Commit is a commit as Git has it. Nothing in it is trusted until Verify has said so.
type Commit struct {
	ID      string    // 40 lower-case hex digits
	Parents []string  // ids
	When    time.Time // the committer's claim; never used to decide
	Raw     []byte    // the object's bytes as stored, without Git's "commit <size>\0" header: what its signature covers
	Tree    Tree
}

// Tree is the files of a commit: regular files and folders only, clean paths, read-only.
type Tree interface {
	fs.FS
	// ObjectID returns the Git object id of the file or folder at path, "" if there is none. Within one repository, equal ids
	// are equal content: the object store never replaces an object.
	ObjectID(path string) string
}

// History answers questions about the commits between two others. A path is never trusted for being in it.
type History interface {
	// Ancestor says whether old is new or an ancestor of it.
	Ancestor(ctx context.Context, old, new string) (bool, error)
	// Between lists the commits reachable from new but not from old, newest first, along every parent.
	Between(ctx context.Context, old, new string) ([]Commit, error)
}

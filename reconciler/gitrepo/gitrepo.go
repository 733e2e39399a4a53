// Package gitrepo brings commits from Git and pushes reverts back to it.
//
// A Repository is the host's own bare copy of one branch of one remote. The remote is an untrusted carrier: nothing it sends
// reaches the copy before it has been bounded, hashed and found whole.
//
//	Head          the branch's commit: one look at the reference, and a fetch only if it has moved
//	  look        a local remote: the reference's file; any other: the server's list of references
//	  receive     one pack into a quarantine file, bounded in bytes and time
//	  index       every object of the pack inflated, bounded and hashed; every link of its commits and trees must lead to an
//	              object of the pack or of the copy
//	  check       every path of the new commit's tree
//	  promote     pack, then index, then reference, each synced and renamed: the copy is as before or has all of it
//
// On disk (Dir):
//
//	objects/pack/pack-<sha1>.{pack,idx}   what was promoted, in Git's own formats; git fsck reads it
//	refs/heads/<branch>                   the commit that Head last returned
//	quarantine-*                          a fetch under way; swept by Open
//	gone                                  packs being removed, by name; Open ends what a killed process began
//	lock                                  held (flock) while anything is promoted
//
// There is never a work tree: files are read from trees by object id (Commit.Tree), and every object is hashed again when it
// is read. Objects never change and are never replaced; when the copy itself is found damaged, the next Head fetches the whole
// branch again and drops the damaged packs only once that has been promoted.
//
// What a remote sends is promoted before anyone trusts it, so the copy is bounded as a whole (Limits.Copy). When a new pack
// would not fit, what neither the branch nor Keep leads to is left out of the packs; when it still does not fit, Head refuses it.
//
// Remotes:
//
//	/srv/site.git, file:///srv/site.git   its files are read directly; git, where it is installed, is run for the first fetch
//	                                      and for a push, so that hooks hold
//	ssh://git@host:22/site.git, git@host:site.git   known_hosts is required; a key file, or the agent
//	https://host/site.git                 a password or token from a file or a variable, a CA file if need be
//	http://127.0.0.1:8080/site.git        loopback only
//
// Credentials in a URL are refused. A redirect never carries credentials away and never leads from a public remote into a
// private network.
//
//	r := &gitrepo.Repository{Dir: dir, Remote: "/srv/site.git", Branch: "main"}
//	if err := r.Open(); err != nil { … }
//	defer r.Close()
//	commit, err := r.Head(ctx)
package gitrepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"golang.org/x/crypto/ssh"

	"github.com/kindos/kmo/policy/refusal"
	"github.com/kindos/kmo/policy/trust"
	"github.com/kindos/kmo/reconciler"
)

// Repository is the host's copy of one branch. Set the fields, call Open, and leave them alone after that.
// Its methods may be called at the same time; Head and Revert wait for each other.
type Repository struct {
	Dir    string       // the copy; made if it is not there
	Remote string       // see the package comment
	Branch string       // without refs/heads/
	Limits Limits       // zero fields are the defaults
	Auth   Auth         // for ssh and https
	Signer ssh.Signer   // signs reverts; nil means that Revert is an error
	Name   string       // of the revert's author; "" means kMO
	Email  string       // of the revert's author; "" means kmo@localhost
	Logger *slog.Logger // told when the branch cannot be watched; nil is told nothing
	Now    func() time.Time

	// Keep names the commits that must stay in the copy beside the branch's own: whatever At, Ancestor, Between and Revert may
	// be asked for. It is called when the copy is full, by Head and Revert. After an error, or where it names what the copy does
	// not have, nothing is removed; nor is anything ever if it is nil.
	Keep func() ([]string, error)

	*state
}

// state is what Open makes.
type state struct {
	remote  remote
	mu      sync.Mutex                  // held by Head and Revert
	tip     plumbing.Hash               // guarded by mu: what refs/heads/<branch> of the copy says
	last    trust.Commit                // guarded by mu: the commit at tip, once it was read
	source  *store                      // guarded by mu: the objects of a local remote
	handed  map[plumbing.Hash]time.Time // guarded by mu: what Head has lately returned, and when last
	stated  atomic.Pointer[statement]   // what Head has last read; never nil
	own     *store
	trees   treeCache
	checked map[plumbing.Hash]extent // guarded by mu: folders whose paths were found good
}

// Limits bound what a remote may send. Zero fields are the defaults of defaultLimits.
type Limits struct {
	Bytes    int64         // of a pack
	Copy     int64         // bytes of the copy's packs and indexes; while it is made smaller, its disk has both, and a fetch
	Objects  int           // of a fetch, and files of a commit; the copy has eight times as many
	Object   int64         // bytes of one object
	Ratio    int64         // unpacked bytes for a received one, counted above 256 MiB
	Delta    int           // deltas between an object and its base
	Depth    int           // folders above a file
	Path     int           // bytes
	Refs     int           // references of the remote
	Commits  int           // that Ancestor and Between look at
	Duration time.Duration // of a fetch
	Idle     time.Duration // without a byte from the remote
}

// defaultLimits are the bounds of a Repository that sets none.
func defaultLimits() Limits {
	return Limits{
		Bytes: 2 << 30, Copy: 4 << 30, Objects: 500_000, Object: 64 << 20, Ratio: 1000, Delta: 50, Depth: 32, Path: 4096, Refs: 10_000,
		Commits: 100_000, Duration: 10 * time.Minute, Idle: time.Minute,
	}
}

// Auth says where the credentials are. They are read at each use, so a rotated one is found.
type Auth struct {
	User         string // https; "" means git
	PasswordFile string // https: a password or token, without its last newline
	PasswordEnv  string // https: the variable that holds it, if there is no file
	CAFile       string // https: PEM, instead of the system's authorities
	KeyFile      string // ssh: a private key without a passphrase; "" means the agent at SSH_AUTH_SOCK
	KnownHosts   string // ssh: required
}

// Open checks the fields, reporting all that is wrong at once, and opens or makes the copy. It does not ask the remote.
func (r *Repository) Open() error {
	s := &state{checked: map[plumbing.Hash]extent{}, handed: map[plumbing.Hash]time.Time{}}
	s.stated.Store(&statement{})
	if err := r.validate(s); err != nil {
		return err
	}
	for _, dir := range []string{"objects/pack", "objects/info", "refs/heads"} {
		if err := os.MkdirAll(filepath.Join(r.Dir, dir), 0o700); err != nil {
			return fmt.Errorf("making the copy: %v", err)
		}
	}
	for name, text := range map[string]string{
		"HEAD":   "ref: refs/heads/" + r.Branch + "\n",
		"config": "[core]\n\trepositoryformatversion = 0\n\tbare = true\n",
	} {
		if err := os.WriteFile(filepath.Join(r.Dir, name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("making the copy: %v", err)
		}
	}
	if err := r.locked(r.sweep); err != nil {
		return fmt.Errorf("sweeping the copy: %v", err)
	}
	own, err := openStore(filepath.Join(r.Dir, "objects"), r.Limits)
	if err != nil {
		return fmt.Errorf("opening the copy: %v", err)
	}
	s.own = own
	r.state = s
	r.loadTip()
	return nil
}

// sweep removes what a killed process left: quarantines, half-written files, packs it was removing, and packs without an index.
func (r *Repository) sweep() error {
	if err := r.removeNoted(); err != nil {
		return err
	}
	var left []string
	for _, pattern := range []string{"quarantine-*", ".*[0-9]"} { // what renameio leaves is .NAME and a number
		found, err := filepath.Glob(filepath.Join(r.Dir, pattern))
		if err != nil {
			return err
		}
		left = append(left, found...)
	}
	packs, err := filepath.Glob(filepath.Join(r.Dir, "objects/pack/pack-*.pack"))
	if err != nil {
		return err
	}
	for _, p := range packs {
		if _, err := os.Lstat(strings.TrimSuffix(p, ".pack") + ".idx"); errors.Is(err, os.ErrNotExist) {
			left = append(left, p)
		}
	}
	for _, path := range left {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	return nil
}

// loadTip reads where the copy is. What cannot be read is a reason to fetch everything again, not an error.
func (r *Repository) loadTip() {
	text, err := readRegular(filepath.Join(r.Dir, "refs/heads", filepath.FromSlash(r.Branch)), 100)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	h, next, bad := parseRef(strings.TrimSpace(string(text)))
	if err == nil && bad == nil && next == "" {
		if _, err = r.commit(r.own, h); err == nil {
			r.tip = h
		}
	}
	if r.tip.IsZero() {
		r.own.damaged.Store(true)
	}
}

// Close lets go of the files.
func (r *Repository) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.own.close()
	r.closeSource()
	return nil
}

func (r *Repository) validate(s *state) error {
	var errs []error
	if r.Dir == "" {
		errs = append(errs, errors.New("dir: none; want a folder for the copy"))
	}
	if err := checkBranch(r.Branch); err != nil {
		errs = append(errs, err)
	}
	var err error
	if s.remote, err = parseRemote(r.Remote); err != nil {
		errs = append(errs, err)
	} else if s.remote.scheme == "ssh" && r.Auth.KnownHosts == "" {
		errs = append(errs, errors.New("known_hosts: none; want a file that has the remote's key: an unknown server is not trusted"))
	}
	r.Limits.fill()
	if r.Logger == nil {
		r.Logger = slog.New(slog.DiscardHandler)
	}
	if r.Name == "" {
		r.Name = "kMO"
	}
	if r.Email == "" {
		r.Email = "kmo@localhost"
	}
	if r.Now == nil {
		r.Now = time.Now
	}
	for _, text := range []string{r.Name, r.Email} {
		if strings.ContainsAny(text, "<>") || refusal.Clip(text, 200) != text {
			errs = append(errs, fmt.Errorf("author %q: want a name and an address without <, > and control characters", refusal.Clip(text, 100)))
		}
	}
	return errors.Join(errs...)
}

func (l *Limits) fill() {
	d := defaultLimits()
	for _, p := range []struct{ field, other *int }{
		{&l.Objects, &d.Objects}, {&l.Delta, &d.Delta}, {&l.Depth, &d.Depth}, {&l.Path, &d.Path}, {&l.Refs, &d.Refs}, {&l.Commits, &d.Commits},
	} {
		if *p.field == 0 {
			*p.field = *p.other
		}
	}
	for _, p := range []struct{ field, other *int64 }{{&l.Bytes, &d.Bytes}, {&l.Copy, &d.Copy}, {&l.Object, &d.Object}, {&l.Ratio, &d.Ratio}} {
		if *p.field == 0 {
			*p.field = *p.other
		}
	}
	if l.Duration == 0 {
		l.Duration = d.Duration
	}
	if l.Idle == 0 {
		l.Idle = d.Idle
	}
}

// At returns a promoted commit by id, without the network; beside it, the head statement that Head has last found. Any other id is an error that is no refusal.
func (r *Repository) At(_ context.Context, id string) (reconciler.Commit, error) {
	h, err := parseID(id)
	if err != nil {
		return reconciler.Commit{}, err
	}
	return r.withStatement(r.commit(r.own, h))
}

// commit reads a commit from a store.
func (r *Repository) commit(s *store, h plumbing.Hash) (trust.Commit, error) {
	raw, err := s.readAs(plumbing.CommitObject, h)
	if s == r.own {
		err = ours(err)
	}
	if err != nil {
		return trust.Commit{}, err
	}
	c, err := parseCommit(raw)
	if err != nil {
		return trust.Commit{}, &refusal.Error{Code: "E_OBJ_MALFORMED", Subject: "commit " + h.String(), Got: err.Error(), Want: "a commit as git writes it"}
	}
	out := trust.Commit{ID: h.String(), When: c.when, Raw: raw, Tree: &tree{store: s, cache: &r.trees, root: c.tree, limits: r.Limits}}
	for _, p := range c.parents {
		out.Parents = append(out.Parents, p.String())
	}
	return out, nil
}

// Ancestor says whether old is new or an ancestor of it. A commit that the copy does not have is nobody's ancestor.
func (r *Repository) Ancestor(ctx context.Context, old, new string) (bool, error) {
	from, err := parseID(old)
	if err != nil {
		return false, err
	}
	to, err := parseID(new)
	if err != nil {
		return false, err
	}
	found := false
	err = r.walk(ctx, to, func(h plumbing.Hash, _ commitHead) bool {
		found = found || h == from
		return !found
	})
	return found, err
}

// Between lists the commits reachable from new but not from old, children before parents, along every parent. Dates do not
// count. An empty old stands for nothing: all of new's history.
func (r *Repository) Between(ctx context.Context, old, new string) ([]trust.Commit, error) {
	to, err := parseID(new)
	if err != nil {
		return nil, err
	}
	var from plumbing.Hash
	if old != "" {
		if from, err = parseID(old); err != nil {
			return nil, err
		}
	}
	parents, roots := map[plumbing.Hash][]plumbing.Hash{}, false
	err = r.walk(ctx, to, func(h plumbing.Hash, c commitHead) bool {
		if h == from {
			return false
		}
		parents[h] = c.parents
		roots = roots || len(c.parents) == 0
		return true
	})
	if err == nil && roots && !from.IsZero() { // some path went past old, perhaps into what old has
		err = r.walk(ctx, from, func(h plumbing.Hash, _ commitHead) bool {
			delete(parents, h)
			return true
		})
	}
	if err != nil {
		return nil, err
	}
	return r.ordered(to, parents)
}

// ordered reads the commits of a graph, children before parents.
func (r *Repository) ordered(head plumbing.Hash, parents map[plumbing.Hash][]plumbing.Hash) ([]trust.Commit, error) {
	children := map[plumbing.Hash]int{}
	for _, all := range parents {
		for _, p := range all {
			children[p]++
		}
	}
	var list []trust.Commit
	for next := []plumbing.Hash{head}; len(next) > 0; next = next[1:] {
		if _, ok := parents[next[0]]; !ok {
			continue
		}
		c, err := r.commit(r.own, next[0])
		if err != nil {
			return nil, err
		}
		list = append(list, c)
		for _, p := range parents[next[0]] {
			if children[p]--; children[p] == 0 {
				next = append(next, p)
			}
		}
	}
	return list, nil
}

// walk visits a commit and what visit lets it go on to, each once.
func (r *Repository) walk(ctx context.Context, from plumbing.Hash, visit func(plumbing.Hash, commitHead) bool) error {
	seen := map[plumbing.Hash]bool{from: true}
	for next := []plumbing.Hash{from}; len(next) > 0; next = next[1:] {
		if err := ctx.Err(); err != nil {
			return err
		}
		if len(seen) > r.Limits.Commits {
			return tooLarge("the history below "+from.String(), int64(len(seen)), int64(r.Limits.Commits), "commits")
		}
		raw, err := r.own.readAs(plumbing.CommitObject, next[0])
		if err != nil {
			return err
		}
		c, err := parseCommit(raw)
		if err != nil {
			return fmt.Errorf("commit %s: %v", next[0], err)
		}
		if !visit(next[0], c) {
			continue
		}
		for _, p := range c.parents {
			if !seen[p] {
				seen[p] = true
				next = append(next, p)
			}
		}
	}
	return nil
}

// parseID reads 40 lower-case hex digits.
func parseID(id string) (plumbing.Hash, error) {
	h := plumbing.NewHash(id)
	if h.IsZero() || h.String() != id {
		return h, fmt.Errorf("commit id %q: want 40 lower-case hex digits", refusal.Clip(id, 60))
	}
	return h, nil
}

// commitHead is the part of a commit object that kMO reads by itself; trust has its own, stricter parser.
type commitHead struct {
	tree    plumbing.Hash
	parents []plumbing.Hash
	when    time.Time // the zero time if the line is not readable
}

// parseCommit reads the headers that every commit begins with: one tree, its parents, author, committer, in that order.
func parseCommit(raw []byte) (commitHead, error) {
	var c commitHead
	header, _, _ := bytes.Cut(raw, []byte("\n\n"))
	lines := strings.Split(string(header), "\n")
	take := func(key string) (string, bool) {
		if len(lines) == 0 || !strings.HasPrefix(lines[0], key+" ") {
			return "", false
		}
		value := lines[0][len(key)+1:]
		lines = lines[1:]
		return value, true
	}
	value, ok := take("tree")
	if c.tree = plumbing.NewHash(value); !ok || c.tree.String() != value {
		return c, errors.New("no tree in its first line")
	}
	for {
		value, ok := take("parent")
		if !ok {
			break
		}
		p := plumbing.NewHash(value)
		if p.String() != value {
			return c, errors.New("a parent that is no object id")
		}
		c.parents = append(c.parents, p)
	}
	if _, ok := take("author"); !ok {
		return c, errors.New("no author after its parents")
	}
	value, ok = take("committer")
	if !ok {
		return c, errors.New("no committer after its author")
	}
	for _, line := range lines {
		for _, key := range []string{"tree ", "parent ", "author ", "committer "} {
			if strings.HasPrefix(line, key) {
				return c, fmt.Errorf("a second %sline", key)
			}
		}
	}
	c.when = when(value)
	return c, nil
}

// when reads the seconds of "Name <address> seconds zone".
func when(line string) time.Time {
	fields := strings.Fields(line[strings.LastIndexByte(line, '>')+1:])
	if len(fields) == 0 {
		return time.Time{}
	}
	var seconds int64
	for _, digit := range fields[0] {
		if digit < '0' || digit > '9' || seconds > 1<<40 {
			return time.Time{}
		}
		seconds = seconds*10 + int64(digit-'0')
	}
	return time.Unix(seconds, 0).UTC()
}

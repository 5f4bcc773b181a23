# Close $files (below the home directory) to everyone but their owner.
set -eu
cd "$HOME"
for file in $files; do
    if [ -d "$file" ]; then
        chmod 700 "$file"
    else
        chmod 600 "$file"
    fi
done
